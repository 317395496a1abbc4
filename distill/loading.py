"""Load teachers and students by name; a failure becomes one `UserError`."""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

import students
import teachers
from distill.errors import UserError
from distill.memory import ran_out
from distill.recipe import Recipe
from distill.shipped import shipped_folder
from teachers import folder, gguf
from teachers.fingerprint import difference
from teachers.foreign import plain_config
from teachers.source import resolve
from teachers.teacher import Teacher


def load_teacher(recipe: Recipe, device: torch.device) -> Teacher:
    """The recipe's teacher.

    Raises:
        UserError: it cannot be found, read or used.
    """
    try:
        return teachers.load(
            recipe.teacher,
            device=device,
            trust_remote_code=recipe.teacher_trust_remote_code,
            allow_pickle=recipe.teacher_pickle,
            ignore=recipe.teacher_ignore,
        )
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"teacher: {error}") from error


def teacher_config(recipe: Recipe) -> PretrainedConfig:
    """The teacher's config: of a folder or the hub, from a snapshot shipped under recipes/configs, or from its GGUF.

    Raises:
        UserError: it cannot be found or read.
    """
    name = re.sub(r"([.-]q\d\w*)?\.gguf$", "", recipe.teacher.rpartition("/")[2].lower())
    snapshot = shipped_folder() / "configs" / f"{name}.json"
    if snapshot.is_file() and not Path(recipe.teacher).exists():
        return AutoConfig.from_pretrained(snapshot)
    try:
        source = resolve(recipe.teacher, recipe.teacher_pickle)
        location = source.location
        if source.kind == "gguf":
            return gguf.config(Path(location))
        config = folder.teacher_config(recipe.teacher, location, recipe.teacher_trust_remote_code)
        plain_config(recipe.teacher, config, location)
        return config
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"teacher: {error}") from error


def load_student(path: str | Path) -> nn.Module:
    """A student from a folder or a hub id, ready to be judged.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    if not Path(path).exists() and str(path).count("/") != 1:  # a hub id has one; anything else would be asked for in vain
        raise UserError(
            f"{path} cannot be loaded as a student: there is no such folder; name a run folder or a whole student's folder"
        )
    try:
        return students.load(path).eval()
    except Exception as error:  # what transformers raises on damaged files is of every type
        if ran_out(error):
            raise
        said = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be loaded as a student: {said}; name a run folder or a whole student's folder"
        ) from error


def check_teacher(student: nn.Module, teacher: Teacher, path: str | Path) -> None:
    """Refuse to compare a student with a teacher that is not its own.

    Raises:
        UserError: another vocabulary, or another fingerprint than the student was made from.
    """
    if student.config.vocab_size != teacher.config.vocab_size:
        raise UserError(
            f"{path} has a vocabulary of {student.config.vocab_size}, but the teacher {teacher.reference} one of "
            f"{teacher.config.vocab_size}: they cannot be compared token by token"
        )
    made_from = student.config.distill.get("teacher", {})
    if part := difference(made_from.get("fingerprint", teacher.fingerprint), teacher.fingerprint):
        raise UserError(
            f"{path} was distilled from {made_from['reference']} (fingerprint {made_from['fingerprint']}), not from "
            f"{teacher.reference} (fingerprint {teacher.fingerprint}): they differ in the {part}; pass its own "
            "teacher with --teacher"
        )
