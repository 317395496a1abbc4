"""A run: the student, its twin if asked for, their evaluation, the report and the exports, all in one folder."""

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
from distill.errors import Interrupted, printable
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
from distill.text.overlap import sentence, suspicious
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
    """One run at work: its session, whose recipe is the run's, its folder, where it prints, what may stop it, and, once that
    is made, its student."""

    session: Session
    folder: RunDir
    console: Console
    stopper: Stopper
    student: Student | None = None
    replacing: Replacing | None = None
    twin_made: bool = False

    @cached_property
    def heldout(self) -> Heldout:
        """The text that every student is judged on after its stages."""
        with judging(self.session.recipe, "reading held-out text"):
            return self.session.heldout(self.session.recipe.evaluation.tokens)

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.session.accelerator.is_main_process

    def choose_layout(self) -> None:
        """Where the recipe says how its layout is selected: do that, and go on with the recipe that says the layout."""
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
        """The student's way through its stages, then its twin's where the recipe asks for one, then None. Ask again when the
        last one is trained and saved."""
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
        """The twin's, of the layouts that the student came to have."""
        replacing = cast(Replacing, self.replacing)
        return twin_recipe(self.session.recipe, replacing.first, replacing.layouts)

    def conclude(self) -> None:
        """Judge every row, draw, write the report and the exports; of an earlier attempt only what is missing. All processes
        judge; what follows is the first one's alone, and nobody waits for it."""
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
        """Say how many chats are longer than their text's windows, and what was done about them."""
        session = self.session
        texts = {"data.heldout": session.heldout_windows, "data.train": session.windows} | session.stage_texts()
        for where, windows in texts.items():
            if windows.fitted:
                self.console.print(Text.assemble(("  warning", "yellow"), f": {where}: {windows.fitted}"))

    def _announce(self, pipeline: Pipeline) -> None:
        """Say what is converted, and what the untrained windows of the same layout reach: the bar to clear."""
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
                    f": {sentence(overlap)}: what is judged on them is not held out; take them out of data.train or "
                    "data.heldout",
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
                f"  {'untrained':<10}            {told(measured)}   (the windows alone; teacher "
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
    """A run of a recipe, its folder kept for this process while the block runs.

    Raises:
        UserError: anything that the user can mend. Interrupted: stopped early, everything saved.
    """
    check_here(recipe)
    console, path = console or new_console(stderr=True), RunDir.path_of(recipe, runs)
    with console.status("loading the teacher and preparing the text"):  # seen on a terminal only
        session = Session.open(recipe, path)
    check_session(session)
    main = session.accelerator.is_main_process
    console = console if main else Console(quiet=True)
    with alone(path) if main else nullcontext():
        with session.accelerator.main_process_first():
            folder = RunDir.open(recipe, runs, fresh and main)
        if main and folder.read("run.json", {}).get("finished"):  # what comes may be stopped before it is again
            folder.update("run.json", finished=False)
        console.print(Text.assemble(bold(recipe.name), printable(f"  {folder.path}")))
        try:
            with enough_memory("the run"):  # where it can be said what to lower, that is said inside
                yield Run(session, folder, console, stopper)
        except Interrupted:  # all of them stop
            session.accelerator.end_training()
            raise
        finally:
            trackers.finish(session.accelerator)
    session.accelerator.end_training()


def save_student(pipeline: Pipeline) -> None:
    """The finished student with its tokenizer, loadable by transformers; written by one process."""
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
