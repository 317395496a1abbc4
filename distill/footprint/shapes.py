"""Teachers, students and texts without values, of a published model's shape, for measuring a stage's memory."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from distill.build import empty
from distill.compat import own_tensors
from distill.text.windows import Batch
from students.config import Layout
from students.skeleton import Student
from teachers.families import Family
from teachers.teacher import Teacher


def teacher_of(reference: str, config: PretrainedConfig, family: Family, dtype: torch.dtype) -> Teacher:
    """A teacher whose parameters are all of type `dtype`, made inside a `FakeTensorMode`. Its rotary tables stay float32."""
    attention = {} if family.attention is None else {"attn_implementation": family.attention}
    model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.float32, **attention)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return Teacher(reference, model.requires_grad_(False).eval(), None, family)


def student_of(teacher: Teacher, layout: Layout) -> Student:
    """A student of such a teacher, as `build.build` makes it: its backbone shares the teacher's memory."""
    student = empty(teacher, layout)
    theirs = dict(teacher.model.named_parameters()) | dict(teacher.model.named_buffers())
    made: dict[int, Tensor] = {}
    for path, module in student.named_modules():
        for group in own_tensors(module):
            for name, tensor in group.items():
                if tensor is None:
                    continue
                whole = f"{path}.{name}" if path else name
                if id(tensor) not in made:  # keeps parameters shared that several layers share
                    made[id(tensor)] = _own(theirs[whole].detach() if whole in theirs else _real(tensor), tensor)
                group[name] = made[id(tensor)]
    student.tie_weights()
    return student.requires_grad_(False).eval()


def _real(tensor: Tensor) -> Tensor:
    """A CPU tensor with the shape and type of a meta tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _own(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, as a new parameter if `like` is one, so that training the student's does not train the teacher's."""
    return nn.Parameter(tensor, requires_grad=False) if isinstance(like, nn.Parameter) else tensor


def text_of(windows: int, seq_len: int) -> Batch:
    """A batch of `windows` windows, made inside a `FakeTensorMode`."""
    whole = [torch.zeros(windows, seq_len, dtype=torch.long) for _ in range(5)]
    ids, documents, positions, targets, labels = whole
    return Batch(ids, documents, positions, targets, torch.ones(windows, seq_len), labels)
