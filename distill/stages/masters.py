"""Float32 masters: a student's trained parameters in their own float32 memory, whatever the type of the teacher's weights.

Tensors that no stage trains stay in the teacher's memory. A parameter is copied out of it once, before its first training.
"""

import torch
from torch import nn

from distill.mixed_types import join_types
from students.skeleton import Student


def make_masters(student: Student, trained: dict[str, tuple[str, nn.Parameter]]) -> None:
    """Give trained parameters their own float32 memory, and set `requires_grad`."""
    for _, parameter in trained.values():
        own(parameter)
        parameter.requires_grad_(True)
    join_types(student)


def own(parameter: nn.Parameter) -> None:
    """Give a parameter its own copy of its values, in float32 or wider."""
    parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)


def is_own(parameter: nn.Parameter, shared: nn.Parameter | None) -> bool:
    """Whether a parameter no longer shares memory with the teacher. shared: the teacher's parameter of that name."""
    if shared is None or shared.dtype != parameter.dtype:
        return True
    return parameter.data_ptr() != shared.data_ptr()
