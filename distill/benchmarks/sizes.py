"""Bytes of a model's weights and cache, and the batch size that fits into memory: computed from shapes alone."""

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

MOST = {"cuda": 4096, "cpu": 4}  # the largest batch size
FILLED = 0.85  # the share of free memory that a first guess fills


@dataclass(frozen=True)
class Sizes:
    """weights: the bytes of weights that a decoding step reads, by batch size. cache: the bytes of one sequence's cache, by
    its length in tokens."""

    weights: Callable[[int], int]
    cache: Callable[[int], int]


def sizes_of(model: PreTrainedModel) -> Sizes:
    """The sizes of a teacher or a student, in the dtype of its weights."""
    dtype = cast(nn.Embedding, model.get_input_embeddings()).weight.dtype
    student = cast(Student, model)
    if not hasattr(model, "layout"):  # the teacher's cache is that of a student with nothing swapped
        teacher = Teacher(model.config.model_type, model, None, family_of(model.config, model.config.model_type))
        student = empty(teacher, Layout(KEEP * teacher.n_layers))
    return Sizes(lambda rows: weight_bytes(model, rows, dtype), lambda tokens: state_bytes(student, tokens, dtype))


def most_texts(model: PreTrainedModel, sizes: Sizes, tokens: int) -> int:
    """About the largest batch of sequences of `tokens` tokens that fits into free memory, a multiple of 8 from 8 on."""
    most = MOST[model.device.type]
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        most = min(most, int(FILLED * free) // max(sizes.cache(tokens), 1))
    return max(1, most if most < 8 else most // 8 * 8)
