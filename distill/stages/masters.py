"""Float32 masters: what a stage trains has its own memory, in float32, whatever type the teacher is held in.

A student's tensors that no stage trains lie in the teacher's memory. What a stage is about to train leaves it here, once.
"""

import torch
from torch import nn

from distill.mixed_types import join_types
from students.skeleton import Student


def make_masters(student: Student, trained: dict[str, tuple[str, nn.Parameter]]) -> None:
    """Give trained parameters their own float32 memory, and let them learn."""
    for _, parameter in trained.values():
        own(parameter)
        parameter.requires_grad_(True)
    join_types(student)


def own(parameter: nn.Parameter) -> None:
    """Give a parameter a copy of its values for itself, in float32 or wider."""
    parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)


def is_own(parameter: nn.Parameter, shared: nn.Parameter | None) -> bool:
    """Whether a parameter has left the memory that it shared. shared: the teacher's of that name."""
    if shared is None or shared.dtype != parameter.dtype:
        return True
    return parameter.data_ptr() != shared.data_ptr()
