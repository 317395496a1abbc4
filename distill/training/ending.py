"""The end of a run, in parts: its student, its judgement, pictures and samples, the report, every export.

Each part is written down in run.json when it is made, with its files and the state of the student that it is of. The same
command makes what is missing: after a part that failed or was killed, and after files of a finished run were deleted.
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
USUAL = {  # files of parts, where an earlier version did not write them down
    STUDENT: ["student/config.json"],
    PICTURES: [MATRICES, SAMPLES],
    REPORT: ["report.html", "report.md"],
}


def parts_of(recipe: Recipe) -> list[str]:
    """The parts of a run's end, in order."""
    return [STUDENT, JUDGED, PICTURES, REPORT, *(f"export/{kind}" for kind in recipe.export)]


def state_of(folder: RunDir) -> str:
    """What says which state the student of a folder has: the digest of its last checkpoint; empty where there is none."""
    path = checkpoint.latest(folder.checkpoints)
    return checkpoint.read_state(path, files=False).digest if path else ""


def made(folder: RunDir, part: str, of: str = "", finished: bool = False) -> bool:
    """Whether a part is made and all its files are there.

    Args:
        of: the state that it should be of, where that is known. finished: that the run which the folder belongs to is.
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
    """Note that a part is made."""
    named = sorted(str(file.relative_to(folder.path)) for file in files)

    def add(facts: dict) -> None:
        facts["ended"] = {**facts.get("ended", {}), part: {"of": of, "files": named}}

    folder.change("run.json", add)


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def exported_files(folder: Path) -> list[Path]:
    """The files of an export, without what its owner put beside them."""
    return [folder / name for name in (MARKER, *listed(folder))]


def judging(recipe: Recipe, doing: str) -> AbstractContextManager[None]:
    """What to lower where the memory does not suffice for held-out text."""
    options, data = recipe.evaluation, recipe.data
    return enough_memory(
        doing,
        f"evaluation.tokens (now {options.tokens}), evaluation.final_tokens (now {options.final_tokens or 'as many'}) "
        f"or evaluation.seq_len (now {options.seq_len or data.seq_len})",
    )


@dataclass
class Ending:
    """A run whose student and twin are saved, at its end.

    session, student: made where a part asks for them. of: see `state_of`. first: whether this process is the one that makes
    what is not divided over processes.
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
        """Make every part that is missing. One that fails does not keep the others from being made.

        Raises:
            UserError: of the first part that failed, saying that the student is saved, and how it is tried again.
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
                    if part in (JUDGED, PICTURES):  # the page shows them
                        self._forget(REPORT)
        if failures:
            raise failures[0]
        self.folder.update("run.json", finished=True)

    def follow(self) -> None:
        """Take another process's share of the judging. What fails there is the first one's to tell, and keeps it from none
        of its other parts."""
        with suppress(Exception):
            if self._to_make(JUDGED):
                self._judged()

    def _to_make(self, part: str) -> bool:
        """Whether a part is missing; of one that all processes make, as the first finds it."""
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
            folder.update("run.json", stopped=f"{said}. The student is saved; the same recipe would come to this again")
            raise NotFinite(said) from error
        if preferences := _preferences(evaluations_of(folder)):
            judged["rows"]["student"]["preferences"] = preferences
        folder.update("evaluations.json", final=judged)
        return []

    def _judged(self) -> dict:
        """Every row's results, by all processes together."""
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
        """Say of whatever fails in the block that the student is not lost, and how it is tried again."""
        try:
            yield
        except Exception as error:  # what libraries raise here is of every type
            if ran_out(error):
                raise
            kind = type(error) if isinstance(error, UserError) else UserError
            raise kind(
                f"{reason_of(error)}; the student is saved in {self.folder.student}, and the same command tries this part "
                f"of the run's end again ({part})"
            ) from error


def _indented(console: Console, line: str) -> None:
    console.print(f"  {line}")


def show_end(folder: RunDir, console: Console) -> None:
    """The table that ends a run, and where the report is."""
    with shown([folder]):
        console.print(headline(evaluations_of(folder)["final"]))
    console.print(f"  report: {folder.path / 'report.html'}")


def _preferences(evaluations: dict) -> dict | None:
    """What the last stage on pairs measured on those that it held out; None where there is none."""
    found = [measured["preferences"] for measured in evaluations.get("after", {}).values() if "preferences" in measured]
    return found[-1] if found else None
