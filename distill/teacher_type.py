"""The type of a teacher's weights in a run, from the recipe and the device."""

from typing import cast

import torch

from distill.recipe import Recipe
from teachers.held_type import STORED, HeldType


def teacher_type(recipe: Recipe, device: torch.device | str) -> HeldType:
    """The type that the teacher is loaded in, which is also the type of the student's tensors that no stage trains.

    By default it is the checkpoint's own on a GPU, and float32 on a CPU or if the whole run is float32. An int8 teacher is
    quantised from the bfloat16 one.
    """
    if recipe.teacher_dtype == "float32":
        return torch.float32
    if recipe.teacher_dtype in ("bfloat16", "int8"):
        return torch.bfloat16
    if torch.device(device).type == "cpu" or recipe.precision == "float32":
        return torch.float32
    return cast(HeldType, STORED)


def config_type(recipe: Recipe, device: torch.device | str, said: torch.dtype | None) -> torch.dtype:
    """As `teacher_type`, for a checkpoint of which only the config is known. said: the config's `dtype`."""
    found = teacher_type(recipe, device)
    if isinstance(found, torch.dtype):
        return found
    return torch.float32 if said is None or said.itemsize >= 4 else torch.bfloat16
