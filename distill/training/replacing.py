"""Conversion of further layers during a run, and the layouts of a student after each of its stages."""

from collections.abc import Sequence
from typing import cast

from rich.console import Console

from distill.evaluation.identity import Before, before_replacing, check_replaced
from distill.recipe import Recipe
from distill.runs.checkpoint import RunState
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.selection.present import choose_layers
from distill.stages import StageEntry, stages_of
from distill.stages.layouts import Further, first_layout, layout_after, layout_saved, layouts_of
from distill.stages.stage import Stage, Transfers
from distill.text.windows import Calibration
from students.config import Layout
from students.converting import further
from students.skeleton import Student


class Replacing:
    """Converts further layers of a session's student in the stages that do so.

    left: the pattern after each finished conversion, by the stage's index, in the form that checkpoints have.
    """

    def __init__(self, session: Session, folder: RunDir, console: Console, stopper: Stopper, where: str) -> None:
        self.session, self.folder, self.console, self.stopper, self.where = session, folder, console, stopper, where
        self.first = first_layout(session.recipe, session.teacher.n_layers, where)
        self.left: dict[str, str] = {}
        self._before: Before | None = None

    @property
    def layouts(self) -> list[Layout]:
        """The layout of each stage. Layers that are still to be chosen are spread evenly."""
        return known_layouts(self.session.recipe, self.first, self.left, self.where)

    @property
    def last(self) -> Layout:
        """The layout at the end of the run, as far as it is known."""
        return self.layouts[-1] if self.session.recipe.stages else self.first

    def prepare(self, entry: StageEntry, stage: Stage, calibration: Calibration) -> None:
        """Before a stage converts layers, choose them and record the student's outputs for `check`.

        Raises:
            UserError: the layers cannot be converted, or plain attention does not reproduce theirs.
            Interrupted: stopped while layers were measured; all measurements are kept.
        """
        student, stay = stage.student, None
        if cast(Further, entry.options).scorer:
            stay = choose_layers(self.session, self.folder, entry, student, calibration, self.console, self.stopper)
        layout = layout_after(self.session.recipe, entry, student.layout, self.where, stay)
        stage.become(layout)
        self._before = before_replacing(self.session.teacher, student, further(student.layout, layout))

    def check(self, entry: StageEntry, stage: Stage) -> dict:
        """After the conversion, check that the rest of the student is unchanged. Returns the entry for evaluations.json.

        Raises:
            UserError: the rest of the student changed.
        """
        student, before, self._before = stage.student, self._before, None
        found = check_replaced(self.session.teacher, student, stage.taken, cast(Before, before))
        self.left[str(entry.index)] = student.layout.pattern
        count, depth = len(student.layout.converted), len(student.layout.pattern)
        self.console.print(
            f"  {entry.name}: layers {', '.join(map(str, student.newest))} converted, {count} of {depth} so far; with their "
            f"attention put back the logits are off by {found['logits']:.1g}",
            highlight=False,
        )
        return {"pattern": student.layout.pattern, "converted": list(student.newest), "identity": found}

    def reinstate(self, entries: Sequence[StageEntry], state: RunState, student: Student, transfers: Transfers) -> None:
        """Give a newly built student the structure that finished stages left, before a checkpoint's weights are loaded.

        Raises:
            UserError: no stage of the recipe makes the checkpoint's layout.
        """
        recipe, teacher = self.session.recipe, self.session.teacher
        self.left = dict(state.layouts)
        for entry in entries[: state.stage + state.done]:
            if entry.kind.changes_layout:
                stage, pattern = entry.make(teacher, student, transfers), self.left.get(str(entry.index), "")
                stage.become(layout_saved(recipe, pattern, student.layout, f"{self.folder.checkpoints / state.place}"))
                stage.reinstate()
            elif state.done and entry.index == state.stage:
                entry.make(teacher, student, transfers).reinstate()


def known_layouts(recipe: Recipe, first: Layout, left: dict[str, str], where: str) -> list[Layout]:
    """The layout of each stage of a recipe, given the patterns that some of its stages left."""
    if not left:
        return layouts_of(recipe, first, where)
    found, now = [], first
    for entry in stages_of(recipe):
        if entry.kind.changes_layout:
            pattern = left.get(str(entry.index))
            now = layout_after(recipe, entry, now, where) if pattern is None else layout_saved(recipe, pattern, now, where)
        found.append(now)
    return found
