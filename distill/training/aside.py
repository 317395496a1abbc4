"""The teacher off the GPU while a stage trains without it, back for what needs it: checkpoints' probes and evaluations.

What the student still shares with the teacher stays where it is, so the two share it afterwards too.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from teachers.teacher import Teacher


class Aside:
    """Moves the teacher's own weights off its device and back."""

    def __init__(self, teacher: Teacher) -> None:
        self._model, self._device = teacher.model, teacher.device
        self._moved: list[nn.Parameter] = []

    @contextmanager
    def away(self, student: nn.Module) -> Iterator[None]:
        """Keep the teacher's weights in the CPU's memory while the block runs; nothing to do on a CPU."""
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
        """Have them on the device while the block runs, where they are away."""
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
