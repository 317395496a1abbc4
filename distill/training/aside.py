"""Offloading of the teacher to the CPU while a stage trains without it.

It returns to the GPU for probes at checkpoints and for evaluations. Weights that the student shares with the teacher are not
moved, so the two still share them afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from teachers.teacher import Teacher


class Aside:
    """Moves the weights that only the teacher uses to the CPU and back."""

    def __init__(self, teacher: Teacher) -> None:
        self._model, self._device = teacher.model, teacher.device
        self._moved: list[nn.Parameter] = []

    @contextmanager
    def away(self, student: nn.Module) -> Iterator[None]:
        """Keep the teacher's weights in CPU memory while the block runs. On a CPU, do nothing."""
        if self._device.type != "cuda":
            yield
            return
        self._moved = own_weights(self._model, student)
        self._move("cpu")
        try:
            yield
        finally:
            self._move(self._device)
            self._moved = []

    @contextmanager
    def back(self) -> Iterator[None]:
        """Return the weights to the device while the block runs, if they are away."""
        self._move(self._device)
        try:
            yield
        finally:
            if self._moved:
                self._move("cpu")

    def _move(self, place: torch.device | str) -> None:
        for parameter in self._moved:
            parameter.data = parameter.data.to(place)
        if self._moved and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def own_weights(model: nn.Module, student: nn.Module) -> list[nn.Parameter]:
    """The plain parameters of a model whose memory a student does not use."""
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*student.parameters(), *student.buffers())}
    return [
        parameter
        for parameter in model.parameters()
        if type(parameter.data) is torch.Tensor and parameter.untyped_storage().data_ptr() not in shared
    ]
