"""What a model's weights and cache come to in bytes, and how many texts fit beside each other: from shapes alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.build import empty
from students.config import KEEP, Layout
from students.skeleton import Student
from students.state_size import state_bytes, weight_bytes
from teachers.families import family_of
from teachers.teacher import Teacher

MOST = {"cuda": 4096, "cpu": 4}  # texts at once
FILLED = 0.85  # of the free memory that a first guess fills


@dataclass(frozen=True)
class Sizes:
    """weights: bytes that a token of so many texts reads; cache: of one text of so many tokens."""

    weights: Callable[[int], int]
    cache: Callable[[int], int]


def sizes_of(model: PreTrainedModel) -> Sizes:
    """Those of a teacher or a student, in the type of its weights."""
    dtype = cast(nn.Embedding, model.get_input_embeddings()).weight.dtype
    student = cast(Student, model)
    if not hasattr(model, "layout"):  # the teacher's cache is that of a student with nothing swapped
        teacher = Teacher(model.config.model_type, model, None, family_of(model.config, model.config.model_type))
        student = empty(teacher, Layout(KEEP * teacher.n_layers))
    return Sizes(lambda rows: weight_bytes(model, rows, dtype), lambda tokens: state_bytes(student, tokens, dtype))


def most_texts(model: PreTrainedModel, sizes: Sizes, tokens: int) -> int:
    """About how many texts of so many tokens fit into the memory that is free, a multiple of 8 where there are as many."""
    most = MOST[model.device.type]
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        most = min(most, int(FILLED * free) // max(sizes.cache(tokens), 1))
    return max(1, most if most < 8 else most // 8 * 8)
