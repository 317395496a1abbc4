"""The check for outputs that are not finite while a model is judged. The error names the first such layer."""

from collections.abc import Callable, Iterator
from typing import cast

from torch import Tensor, nn

from distill.errors import UserError
from distill.output_head import wide_head, wide_logits
from distill.stages.nonfinite import CHUNK, first_nonfinite, told
from distill.text.windows import Batch
from students.skeleton import Student
from teachers.teacher import Teacher

HEAD = "the output head"


class NotFinite(UserError):
    """A judged model's output is NaN or infinite."""


def check_finite(teacher: Teacher, model: Student | None, hidden: Tensor | None, wanted: Tensor, batch: Batch) -> None:
    """Refuse last hidden states that are not finite. hidden: the student's, None for the teacher. wanted: the teacher's.

    Raises:
        NotFinite: naming the model, and the first layer that is not finite.
    """
    if not wanted.isfinite().all():
        raise NotFinite(blame(teacher, None, lambda: teacher.hidden(batch.ids, batch.positions)))
    if hidden is not None and not hidden.isfinite().all():
        raise NotFinite(blame(teacher, model, lambda: cast(Student, model).hidden(batch.ids, batch.documents)))


def blame(teacher: Teacher, model: nn.Module | None, forward: Callable[[], object]) -> str:
    """Name the model and its first layer whose output is not finite. model: None for the teacher. forward: runs it again."""
    whose = "teacher" if model is None else "student"
    place = getattr(model, "place", None)  # a student has one; a selection's models wrap the teacher's layers
    layers = teacher.family.layers if place is None else place.layers
    blamed = teacher.model if model is None else model
    return told(whose, first_nonfinite(blamed, forward, layers) or HEAD, blamed)


def blame_logits(teacher: Teacher, model: Student | None, wanted: Tensor) -> str:
    """Name the model with logits that are not finite. wanted: the teacher's hidden states, which are finite [b t d]."""
    if model is None or not all(part.isfinite().all() for part in _logits(teacher.model, wanted)):
        return told("teacher", HEAD, teacher.model)
    return told("student", HEAD, model)


def _logits(model: nn.Module, hidden: Tensor) -> Iterator[Tensor]:
    head = wide_head(model)
    return (wide_logits(part, head) for part in hidden.flatten(0, 1).split(CHUNK))
