"""The end of a run, in parts: the saved student, its evaluation, pictures and samples, the report, every export.

A finished part is recorded in run.json, with its files and the state of the student that it belongs to. The same command
makes missing parts: after a part failed or was killed, and after files of a finished run were deleted.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from rich.console import Console

from distill.division import dividing, first_decides
from distill.errors import UserError, reason_of
from distill.evaluation.nonfinite import NotFinite
from distill.evaluation.samples import MATRICES, SAMPLES, collect
from distill.evaluation.stored import evaluations_of
from distill.evaluation.target import judge_session
from distill.exporters.exporting import export_student
from distill.exporters.place import MARKER, listed
from distill.memory import enough_memory, ran_out
from distill.recipe import Recipe
from distill.reports import headline, shown, write_report
from distill.runs import checkpoint
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from distill.training.twin import known_results
from students.skeleton import Student

STUDENT, JUDGED, PICTURES, REPORT = "student", "judged", "pictures", "report"
USUAL = {  # files of parts, for run folders of earlier versions, which did not record them
    STUDENT: ["student/config.json"],
    PICTURES: [MATRICES, SAMPLES],
    REPORT: ["report.html", "report.md"],
}


def parts_of(recipe: Recipe) -> list[str]:
    """The parts of a run's end, in order."""
    return [STUDENT, JUDGED, PICTURES, REPORT, *(f"export/{kind}" for kind in recipe.export)]


def state_of(folder: RunDir) -> str:
    """An identifier of the state of a folder's student: the digest of its last checkpoint; empty if there is none."""
    path = checkpoint.latest(folder.checkpoints)
    return checkpoint.read_state(path, files=False).digest if path else ""


def made(folder: RunDir, part: str, of: str = "", finished: bool = False) -> bool:
    """Whether a part is made and all its files exist.

    Args:
        of: the state (`state_of`) that the part should belong to, if known. finished: whether the folder's run is finished.
    """
    known = folder.read("run.json", {})
    record = known.get("ended", {}).get(part)
    if record is None and not (known.get("finished") or finished):
        return False
    if record is not None and of and record["of"] != of:
        return False
    if part == JUDGED:
        return evaluations_of(folder).get("final") is not None
    usual = USUAL.get(part, [f"{part}/config.json"])
    files = usual if record is None else record["files"]
    return bool(files) and all((folder.path / name).is_file() for name in files)


def write_down(folder: RunDir, part: str, of: str, files: list[Path]) -> None:
    """Record in run.json that a part is made."""
    named = sorted(str(file.relative_to(folder.path)) for file in files)

    def add(facts: dict) -> None:
        facts["ended"] = {**facts.get("ended", {}), part: {"of": of, "files": named}}

    folder.change("run.json", add)


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def exported_files(folder: Path) -> list[Path]:
    """The files that an export wrote, without others that were added to its folder."""
    return [folder / name for name in (MARKER, *listed(folder))]


def judging(recipe: Recipe, doing: str) -> AbstractContextManager[None]:
    """A context that turns out-of-memory errors of an evaluation into a message that says which keys to lower."""
    options, data = recipe.evaluation, recipe.data
    return enough_memory(
        doing,
        f"evaluation.tokens (now {options.tokens}), evaluation.final_tokens (now {options.final_tokens or 'as many'}) "
        f"or evaluation.seq_len (now {options.seq_len or data.seq_len})",
    )


@dataclass
class Ending:
    """The end of a run whose student and twin are saved.

    session, student: make these when a part needs them. of: see `state_of`. first: whether this is the first process,
    which makes all parts that are not divided over processes.
    """

    recipe: Recipe
    folder: RunDir
    console: Console
    session: Callable[[], Session]
    student: Callable[[], Student]
    of: str
    first: bool = True

    @cached_property
    def _session(self) -> Session:
        return self.session()

    @cached_property
    def _student(self) -> Student:
        return self.student()

    def finish(self) -> None:
        """Make every missing part. If one fails, the others are still made.

        Raises:
            UserError: the error of the first part that failed; the message says that the student is saved, and how to try
                the part again.
        """
        failures: list[UserError] = []
        for part, make in self._makers():
            if self._to_make(part):
                try:
                    with self._tried(part):
                        write_down(self.folder, part, self.of, make())
                except UserError as error:
                    failures.append(error)
                else:
                    if part in (JUDGED, PICTURES):  # the report shows them
                        self._forget(REPORT)
        if failures:
            raise failures[0]
        self.folder.update("run.json", finished=True)

    def follow(self) -> None:
        """Do this process's share of the evaluation. Errors are ignored here, because the first process reports them."""
        with suppress(Exception):
            if self._to_make(JUDGED):
                self._judged()

    def _to_make(self, part: str) -> bool:
        """Whether a part is missing; the first process decides for a part that all processes make together."""
        with dividing(part == JUDGED):
            return first_decides(lambda: not made(self.folder, part, self.of))

    def _makers(self) -> Iterator[tuple[str, Callable[[], list[Path]]]]:
        yield JUDGED, self._judge
        yield PICTURES, self._draw
        yield REPORT, self._report
        for kind in self.recipe.export:
            yield f"export/{kind}", partial(self._export, kind)

    def _judge(self) -> list[Path]:
        folder = self.folder
        self.console.print("  judging the student, its baselines and the teacher")
        try:
            judged = self._judged()
        except NotFinite as error:
            said = f"judging the student: {error}"
            folder.update("run.json", stopped=f"{said}. The student is saved; the same recipe would fail again")
            raise NotFinite(said) from error
        if preferences := _preferences(evaluations_of(folder)):
            judged["rows"]["student"]["preferences"] = preferences
        folder.update("evaluations.json", final=judged)
        return []

    def _judged(self) -> dict:
        """The results of every row, computed by all processes together."""
        twin, student = self.folder.path / "twin" / "student", self._student
        with dividing():
            known, trained = first_decides(lambda: (known_results(self.recipe, self.folder, student.layout), twin.exists()))
        with judging(self.recipe, "judging the student"):
            return judge_session(self._session, student, twin if trained else None, known=known)

    def _draw(self) -> list[Path]:
        collect(self._session, self._student, self.folder)
        return [self.folder.path / MATRICES, self.folder.path / SAMPLES]

    def _report(self) -> list[Path]:
        page = write_report(self.folder)
        return [page, page.with_suffix(".md")]

    def _export(self, kind: str) -> list[Path]:
        say = partial(_indented, self.console)
        written = export_student(self.folder.path, to=kind, out=self.folder.path / "export" / kind, say=say)
        self.console.print(f"  exported to {written}")
        return exported_files(written)

    def _forget(self, part: str) -> None:
        self.folder.change("run.json", lambda facts: facts.get("ended", {}).pop(part, None))

    @contextmanager
    def _tried(self, part: str) -> Iterator[None]:
        """Add to any error in the block that the student is saved, and how to try the part again."""
        try:
            yield
        except Exception as error:  # libraries raise errors of any type here
            if ran_out(error):
                raise
            kind = type(error) if isinstance(error, UserError) else UserError
            raise kind(
                f"{reason_of(error)}; the student is saved in {self.folder.student}; give the same command again to repeat "
                f"this part of the run ({part})"
            ) from error


def _indented(console: Console, line: str) -> None:
    console.print(f"  {line}")


def show_end(folder: RunDir, console: Console) -> None:
    """Print the table at the end of a run, and the path of the report."""
    with shown([folder]):
        console.print(headline(evaluations_of(folder)["final"]))
    console.print(f"  report: {folder.path / 'report.html'}")


def _preferences(evaluations: dict) -> dict | None:
    """The measurements of the last stage on pairs, on its held-out pairs; None if there is no such stage."""
    found = [measured["preferences"] for measured in evaluations.get("after", {}).values() if "preferences" in measured]
    return found[-1] if found else None
