"""A run: the student, its window-only control (twin) if the recipe has one, their evaluation, the report, the exports."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from distill.build import build
from distill.console import bold, new_console
from distill.disk import new_folder, writing
from distill.division import dividing, first_decides
from distill.errors import printable
from distill.evaluation.baselines import twin_layout
from distill.evaluation.fidelity import fidelity
from distill.evaluation.identity import check_identity
from distill.evaluation.quantised import quantisation_loss, told_of
from distill.evaluation.rows import decimal, told
from distill.evaluation.stored import evaluations_of
from distill.memory import enough_memory
from distill.recipe import Recipe
from distill.runs import checkpoint
from distill.runs.run_dir import RunDir, alone
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.selection.checking import marked
from distill.selection.resolution import resolve, what_to_lower
from distill.selection.tables import strip
from distill.stages import adapters
from distill.text.heldout import Heldout
from distill.text.overlap import sentence, suspicious, verdict
from distill.training import trackers
from distill.training.checks import check_fit, check_here, check_session
from distill.training.ending import STUDENT, Ending, files_in, judging, made, show_end, state_of, write_down
from distill.training.pipeline import Pipeline
from distill.training.rehearsal import rehearse, rehearse_report
from distill.training.replacing import Replacing
from distill.training.twin import twin_recipe
from students.skeleton import Student


@dataclass
class Run:
    """One run in progress: its session with the recipe, its folder, console, stopper, and, once it is built, its student."""

    session: Session
    folder: RunDir
    console: Console
    stopper: Stopper
    student: Student | None = None
    replacing: Replacing | None = None
    twin_made: bool = False

    @cached_property
    def heldout(self) -> Heldout:
        """The held-out text for the evaluations after each stage."""
        with judging(self.session.recipe, "reading held-out text"):
            return self.session.heldout(self.session.recipe.evaluation.tokens)

    @property
    def main(self) -> bool:
        """Whether this is the main process, the only one that writes."""
        return self.session.accelerator.is_main_process

    def choose_layout(self) -> None:
        """If the recipe selects its layout, do the selection and continue with the resolved recipe."""
        recipe = self.session.recipe
        if recipe.selects:
            with enough_memory("the selection", what_to_lower(self.session)):
                resolved, chosen = resolve(self.session, self.folder, self.console, self.stopper)
            self.console.print(Text.assemble(f"  layout selected by {chosen['by']}: ", strip(cast(str, resolved.pattern))))
            self.session = self.session.with_recipe(resolved)
            check_fit(resolved, self.session.teacher)
        elif (found := marked(recipe)) is not recipe:
            if self.main:
                self.folder.resolve(found)
            self.session = self.session.with_recipe(found)

    def next_student(self) -> Pipeline | None:
        """The pipeline of the student, then that of its twin if the recipe has one, then None.

        Call it again when the last student is trained and saved."""
        if self.student is None:
            pipeline = Pipeline(self.session, self.folder, self.console, self.stopper)
            self.student, self.replacing = pipeline.student, pipeline.replacing
            self._announce(pipeline)
            return pipeline
        if not self.session.recipe.twin or self.twin_made:
            return None
        session = self.session.with_recipe(self._twin_recipe())
        folder = RunDir.at(self.folder.path / "twin", session.recipe, fresh=False)
        self.console.print(Text.assemble("  ", bold("twin"), ": the same windows, trained alone"))
        self.twin_made = True
        return Pipeline(session, folder, self.console, self.stopper, every_stage=False)

    def _twin_recipe(self) -> Recipe:
        """The twin's recipe, with the layouts that the student had."""
        replacing = cast(Replacing, self.replacing)
        return twin_recipe(self.session.recipe, replacing.first, replacing.layouts)

    def conclude(self) -> None:
        """Evaluate every row, draw the pictures, write the report and the exports; skip what an earlier attempt made.

        All processes evaluate. The rest is done by the first process alone, and no other waits for it."""
        session, student = self.session, cast(Student, self.student)
        with dividing():
            of = first_decides(lambda: state_of(self.folder))
        ending = Ending(session.recipe, self.folder, self.console, lambda: session, lambda: student, of, self.main)
        if not self.main:
            ending.follow()
            return
        ending.finish()
        show_end(self.folder, self.console)

    def _tell_of_long_chats(self) -> None:
        """Print how many chats are longer than a window of their text, and how they were shortened."""
        session = self.session
        texts = {"data.heldout": session.heldout_windows, "data.train": session.windows} | session.stage_texts()
        for where, windows in texts.items():
            if windows.fitted:
                self.console.print(Text.assemble(("  warning", "yellow"), f": {where}: {windows.fitted}"))

    def _announce(self, pipeline: Pipeline) -> None:
        """Print what is converted, and the result of untrained windows in the same layout, which the student must beat."""
        layout, last, accelerator = pipeline.layout, pipeline.replacing.last, self.session.accelerator
        precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
        self.console.print(
            f"  teacher {pipeline.teacher.reference}: {len(layout.converted)} of {len(layout.pattern)} layers get a mixer"
            + (f", and {len(last.converted)} by the end" if last != layout else "")
            + f" ({accelerator.device}, {precision})"
        )
        with dividing():
            evaluations = first_decides(lambda: evaluations_of(self.folder))
        if "identity" not in evaluations and self.main:
            found = check_identity(pipeline.teacher, last)
            self.folder.update("evaluations.json", identity=found)
        if self.main and (overlap := self.session.overlap) and suspicious(overlap):
            self.console.print(
                Text.assemble(
                    ("  warning", "yellow"),
                    f": {sentence(overlap)}: {verdict(overlap)}",
                )
            )
        if self.main:
            self._tell_of_long_chats()
        if self.main and checkpoint.latest(self.folder.checkpoints) is None:
            final = pipeline.student if last == layout else build(pipeline.teacher, last)[0]
            rehearse(self.session.recipe, pipeline.teacher, final)
            rehearse_report(self.session, final, self.folder)
            del final
        if pipeline.teacher.unquantised:
            self._tell_of_quantisation(evaluations)
        if "untrained" not in evaluations:
            student, _ = build(pipeline.teacher, twin_layout(layout))
            with judging(self.session.recipe, "judging the untrained windows"), dividing(), accelerator.autocast():
                evaluations["untrained"] = fidelity(pipeline.teacher, student, self.heldout)
            if self.main:
                self.folder.update("evaluations.json", untrained=evaluations["untrained"])
        if "untrained" in evaluations:
            measured = evaluations["untrained"]
            self.console.print(
                f"  {'untrained':<10}            {told(measured)}   (baseline: untrained windows in place "
                f"of the mixers; teacher "
                f"{decimal(measured['teacher_perplexity'], 2)})"
            )

    def _tell_of_quantisation(self, evaluations: dict) -> None:
        if "quantised" not in evaluations:
            doing = judging(self.session.recipe, "judging the int8 teacher")
            with doing, dividing(), self.session.accelerator.autocast():
                evaluations["quantised"] = quantisation_loss(self.session.teacher, self.heldout)
            if self.main:
                self.folder.update("evaluations.json", quantised=evaluations["quantised"])
        self.console.print(f"  {told_of(evaluations['quantised'])}", highlight=False)


@contextmanager
def opened(recipe: Recipe, runs: Path, *, fresh: bool, stopper: Stopper, console: Console | None) -> Iterator[Run]:
    """Open a run of a recipe and lock its folder for this process while the block runs.

    Raises:
        UserError: anything that the user can fix. Interrupted: stopped early, with everything saved.
    """
    check_here(recipe)
    console, path = console or new_console(stderr=True), RunDir.path_of(recipe, runs)
    with console.status("loading the teacher and preparing the text"):  # shown on a terminal only
        session = Session.open(recipe, path)
    check_session(session)
    main = session.accelerator.is_main_process
    console = console if main else Console(quiet=True)
    with alone(path) if main else nullcontext():
        with session.accelerator.main_process_first():
            folder = RunDir.open(recipe, runs, fresh and main)
        if main and folder.read("run.json", {}).get("finished"):  # it is not finished until this attempt is
            folder.update("run.json", finished=False)
        console.print(Text.assemble(bold(recipe.name), printable(f"  {folder.path}")))
        try:
            with enough_memory("the run"):  # inner blocks name the keys to lower
                yield Run(session, folder, console, stopper)
        finally:
            trackers.finish(session.accelerator)


def save_student(pipeline: Pipeline) -> None:
    """Save the finished student with its tokenizer in the format of transformers. Only the main process writes."""
    if not pipeline.accelerator.is_main_process:
        return
    student, teacher, folder = pipeline.student, pipeline.teacher, pipeline.folder
    of = state_of(folder)
    if of and made(folder, STUDENT, of):
        return
    student.config.distill["teacher"] = {"reference": teacher.reference, "fingerprint": teacher.fingerprint}
    if (selected := pipeline.recipe.selected) is not None:
        student.config.distill["selected"] = selected.model_dump()
    with writing(folder.student), new_folder(folder.student) as scratch:
        adapters.save(student, scratch)
        cast(PreTrainedTokenizerBase, teacher.tokenizer).save_pretrained(scratch)
    write_down(folder, STUDENT, of, files_in(folder.student))
