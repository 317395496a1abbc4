"""The table of stages, and the checked stages of a recipe.

To add a stage, write a file in this folder with a `Stage` and its `Options`, and add one line to the table."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import cast

from pydantic import ValidationError

from distill.errors import UserError, nearest
from distill.recipe import Data, Recipe
from distill.schema import explain
from distill.stages.stage import Stage, StageOptions, TrainingOptions, Transfers
from distill.stages.targets import Source
from students.skeleton import Student
from teachers.teacher import Teacher

STAGES = {
    "initialise": "distill.stages.initialise:Initialise",
    "orient": "distill.stages.orient:Orient",
    "align": "distill.stages.align:Align",
    "imitate": "distill.stages.imitate:Imitate",
    "replace": "distill.stages.replace:Replace",
    "tune": "distill.stages.tune:Tune",
    "prefer": "distill.stages.prefer:Prefer",
}
STEP = 2**26  # the most tokens of an optimizer step: four times as many as the largest published trainings read
TEXTS = ("plain", "pairs")  # forms of text that a recipe's data can have


@dataclass(frozen=True)
class StageEntry:
    """One entry of a recipe's stages: its place, its name in the table, its class and its checked options."""

    index: int
    name: str
    kind: type[Stage]
    options: StageOptions

    @property
    def key(self) -> str:
        """The stage's key in evaluations.json. It has the index, because a recipe may have two stages of one name."""
        return f"{self.index}-{self.name}"

    def make(self, teacher: Teacher, student: Student, transfers: Transfers | None = None) -> Stage:
        """Builds the stage on the teacher's device. transfers: the weight-transfer record, for stages that add to it."""
        return self.kind(teacher, student, self.options, transfers).to(teacher.device)

    @property
    def source(self) -> Source | None:
        """The source of the teacher's next-token distributions; None for a stage that does not compare any."""
        return self.kind.source(self.options)

    @property
    def runs_teacher(self) -> bool:
        """Whether the run's teacher runs in the stage's steps: not if logits are cached or another teacher is used."""
        source = self.source
        return self.kind.runs(self.options) and not (source and (source.offline or source.teacher))

    def batch(self, data: Data) -> int:
        """Windows of an optimizer step: the stage's own number, else the recipe's."""
        return getattr(self.options, "batch", None) or data.batch

    def seq_len(self, data: Data) -> int:
        """Tokens of a window: the stage's own number, else the recipe's."""
        return getattr(self.options, "seq_len", None) or data.seq_len

    def micro_batch(self, data: Data) -> int:
        """Windows of a micro-batch: the stage's own number, else the recipe's.

        It is the whole batch where the stage has a batch of its own without a micro_batch, and where the value is auto."""
        found = self._micro_batch(data)
        return self.batch(data) if found is None or isinstance(found, str) else found

    def fits_itself(self, data: Data) -> bool:
        """Whether the micro-batch is `auto`: as many windows as fit into memory."""
        return self._micro_batch(data) == "auto"

    def _micro_batch(self, data: Data) -> int | str | None:
        batch, own = getattr(self.options, "batch", None), getattr(self.options, "micro_batch", None)
        return own or (data.micro_batch if batch is None or data.micro_batch == "auto" else None)


def stage_class(name: str) -> type[Stage]:
    """The class of a stage, by its name in the table."""
    module, _, attribute = STAGES[name].partition(":")
    return getattr(import_module(module), attribute)


def key_of(recipe: Recipe, entry: StageEntry) -> str:
    """The key of a stage in overrides and messages."""
    twice = sum(name == entry.name for stage in recipe.stages for name in stage) > 1
    return f"stages.{entry.index if twice else entry.name}"


def stages_of(recipe: Recipe, where: str | None = None) -> list[StageEntry]:
    """A recipe's stages in order, with checked options.

    Args:
        where: the recipe's file, for messages.

    Raises:
        UserError: a stage is not in the table, or its schema refuses an option; the message names the key.
    """
    where, found = where or recipe.name, []
    for index, (name, options) in enumerate(entry for stage in recipe.stages for entry in stage.items()):
        if name not in STAGES:
            raise UserError(f"{where}: stages.{index}: there is no stage {name!r}; {nearest(name, STAGES)}")
        kind = stage_class(name)
        if earlier := sorted(kind.Options.renamed.keys() & set(options)):
            raise UserError(f"{where}: stages.{name}.{earlier[0]} is now {kind.Options.renamed[earlier[0]]}")
        if reserved := sorted(kind.Options.reserved & set(options)):
            raise UserError(f"{where}: stages.{name}.{reserved[0]} is not built yet")
        try:
            found.append(StageEntry(index, name, kind, kind.Options(**options)))
        except ValidationError as error:
            raise UserError(explain(error, f"{where}: stages.{name}", kind.Options)) from error
    return found


def check_stages(recipe: Recipe, where: str) -> None:
    """Refuse stages with impossible options or in an impossible order, before anything is loaded.

    Raises:
        UserError: naming the stage and the key.
    """
    entries, seen = stages_of(recipe, where), set()
    for entry in entries:
        if entry.kind.first and recipe.student is not None:
            raise UserError(
                f"{where}: stages.{entry.index}: {entry.name} makes the mixers anew, but the run starts from the student "
                f"{recipe.student}; leave one of them out"
            )
        if entry.kind.first and entry.index:
            raise UserError(
                f"{where}: stages.{entry.index}: {entry.name} can only come first; it would undo the stages before it"
            )
        if entry.name in seen and not entry.kind.repeats:
            raise UserError(f"{where}: stages.{entry.index}: {entry.name} is listed twice; a recipe may have it once")
        if entry.kind.text not in TEXTS:
            raise UserError(
                f"{where}: stages.{entry.index}: {entry.name} reads text in the form {entry.kind.text!r}, and data.train "
                f"gives {', '.join(TEXTS)} text"
            )
        batch, length = entry.batch(recipe.data), entry.seq_len(recipe.data)
        if entry.kind.text == "pairs":
            _check_pairs(entry, recipe, f"{where}: stages.{entry.index}: {entry.name}")
        if entry.kind.trains and batch * length > STEP:
            lower = f"its seq_len (now {length})" if length != recipe.data.seq_len else "data.seq_len"
            raise UserError(
                f"{where}: stages.{entry.index}: an optimizer step of {entry.name} would read {batch * length:,} tokens, "
                f"{batch:,} windows of {length:,}, and the limit is {STEP:,}; lower data.batch, its own batch or {lower}"
            )
        seen.add(entry.name)
    if recipe.meta_tokens and not any(entry.kind.whole_student for entry in entries):
        raise UserError(
            f"{where}: meta_tokens is {recipe.meta_tokens}, but only {_named('whole_student')} trains them; add that stage, "
            "or leave them out"
        )
    if not entries and recipe.student is not None:
        raise UserError(f"{where}: stages is empty, so the student {recipe.student} would not be trained; name a stage")
    if recipe.student is None and not (entries and entries[0].kind.first):
        raise UserError(f"{where}: stages must begin with {_named('first')}, which makes the mixers")


def _check_pairs(entry: StageEntry, recipe: Recipe, where: str) -> None:
    """Refuse batches and micro-batches that would split a pair, which is two windows.

    Raises:
        UserError: naming the key.
    """
    if entry.fits_itself(recipe.data):
        raise UserError(f"{where}: micro_batch is auto, and a pair is two windows; give the stage an even micro_batch")
    for key, count in (("batch", entry.batch(recipe.data)), ("micro_batch", entry.micro_batch(recipe.data))):
        if count % 2:
            raise UserError(f"{where}: {key} is {count} windows, and a pair is two; give the stage an even {key}")


def check_student(recipe: Recipe, students: Sequence[Student], where: str) -> None:
    """Refuse stages whose options do not fit the student, or whose `lr` by role lacks a role that the stage trains.

    Args:
        students: the student of each stage (`layouts.students_of`). Their weights may be on the meta device.

    Raises:
        UserError: naming the stage, and the role or the option.
    """
    entries = stages_of(recipe, where)
    for entry, student in zip(entries, students, strict=True):
        try:
            entry.kind.check(student, entry.options, last=entry is entries[-1])
            for role in sorted(entry.kind.roles(student, entry.options)):
                cast(TrainingOptions, entry.options).rate(role)
        except ValueError as error:
            raise UserError(f"{where}: stages.{entry.name}: {error}") from error


def _named(flag: str) -> str:
    """The names of the stages that have a flag set, joined for a message."""
    *first, last = (name for name in STAGES if getattr(stage_class(name), flag))
    return f"{', '.join(first)} or {last}" if first else last
