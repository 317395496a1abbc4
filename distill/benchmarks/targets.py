"""Targets of timed stages that do not learn from the recipe's teacher: true sizes, made-up numbers."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from distill.logits.reader import Known
from distill.recipe import Recipe
from distill.stages import StageEntry
from distill.stages.stage import Stage
from distill.stages.targets import Cached, Online
from distill.text.windows import Batch
from distill.training.aside import Aside
from distill.training.caches import rows_of, vocabulary_of
from distill.training.teaching import other_teacher
from students.skeleton import Student
from teachers.teacher import Teacher

TOP_K = 128  # what `distill cache` keeps


class Drawn(Cached):
    """Made-up cached distributions: half of the probability on k tokens, half on all others."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.k = vocabulary, min(TOP_K, vocabulary - 1)

    def see(self, batch: Batch, layers: Sequence[int] = ()) -> Known:
        first = batch.ids[..., None] + torch.arange(self.k, device=batch.ids.device)
        half = torch.full(batch.ids.shape, 0.5, dtype=torch.float16, device=batch.ids.device).log()
        share = torch.full(first.shape, 0.5 / self.k, dtype=torch.float16, device=first.device).log()
        return Known(first % self.vocabulary, share, half)


def learn(recipe: Recipe, entry: StageEntry, stage: Stage, teacher: Teacher, made: Callable[[Recipe], Teacher]) -> None:
    """Give a stage the targets that its options name, where these are not the recipe's teacher.

    Args:
        made: a function that makes the teacher of a recipe.
    """
    source = entry.source
    if source is not None and source.offline is not None:
        stage.learn_from(Drawn(rows_of(teacher)))
    elif source is not None and source.teacher is not None:
        other = made(other_teacher(recipe, source.teacher))
        stage.learn_from(Online(other, vocabulary_of(teacher, other)))


def without(entry: StageEntry, teacher: Teacher, student: Student) -> AbstractContextManager[None]:
    """Keep the recipe's teacher off the GPU while the block runs, where the stage does not run it."""
    return nullcontext() if entry.runs_teacher else Aside(teacher).away(student)
