"""Reports: one self-contained HTML file for a run or a comparison of runs, for phones, dark mode and paper.

page.py holds the common parts, run_page.py and comparison.py the sections of each report; tables.py, svg.py, matrices.py,
curves.py, recall.py and layout.py make tables and figures. `distill.report(run)` and `distill report RUN` write a report
again from the files of the run folder.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from rich.console import Console

from distill.disk import refuse_other, write_text
from distill.errors import UserError, printable
from distill.evaluation.stored import evaluations_of
from distill.reports.comparison import compare_page
from distill.reports.page import HEAD, is_page
from distill.reports.run_page import run_page
from distill.reports.tables import headline, headline_cells, markdown_report
from distill.runs.run_dir import RunDir

__all__ = ["add_judgement", "headline", "headline_cells", "shown", "write_report", "write_reports"]
COMPARISON = "comparison.html"


def write_reports(runs: Sequence[str | PathLike], out: str | Path | None = None) -> Path:
    """Write the report of one run again, or one page that compares several; see `distill.report`."""
    if not runs:
        raise UserError("no run folder is named; give one, `distill report RUN`, or several to compare")
    folders = [RunDir.existing(run) for run in runs]
    if len(folders) == 1 and out is None:
        return write_report(folders[0])
    target, named = Path(out or COMPARISON), "--out is " if out else ""
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"{named}{target}, which is a folder or in no existing folder; name a file in a folder that exists")
    _check_ours(target, named)
    with shown(folders):
        page = run_page(folders[0]) if len(folders) == 1 else compare_page(folders)
    write_text(target, printable(page))
    return target


def write_report(folder: RunDir) -> Path:
    """Write report.html and report.md of a run, finished or not. Returns the HTML file's path.

    Raises:
        UserError: a file of the run is damaged, or the report cannot be written.
    """
    target = folder.path / "report.html"
    with shown([folder]):
        page, text = run_page(folder), markdown_report(folder, evaluations_of(folder))
    write_text(target, printable(page))
    write_text(folder.path / "report.md", printable(text))
    return target


def add_judgement(folder: RunDir, judged: Mapping, console: Console) -> None:
    """Save a suite's results in its run folder, and write the report again. Print a line if the folder is not writable."""

    def add(evaluations: dict) -> None:
        evaluations["suites"] = {**evaluations.get("suites", {}), judged["suite"]: judged}

    try:
        folder.change("evaluations.json", add)
        write_report(folder)
    except UserError as error:
        console.print(f"  these results are not saved in the run folder: {error}")


@contextmanager
def shown(folders: Sequence[RunDir]) -> Iterator[None]:
    """Inside the block, turn errors from results that are valid one by one but inconsistent into a message.

    Raises:
        UserError: naming the files.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        places = ", ".join(str(folder.path / "evaluations.json") for folder in folders)
        raise UserError(
            f"the entries of {places} are inconsistent and cannot be shown: the file was edited, or another version of "
            "distill wrote it; delete it, and the same `distill run` evaluates again (--debug shows what failed)"
        ) from error


def _check_ours(file: Path, named: str) -> None:
    """Refuse to overwrite a file that is not a report.

    Raises:
        UserError: naming the file.
    """
    refuse_other(file)  # opening a pipe would wait for a writer
    if not file.exists():
        return
    with file.open("rb") as opened:
        if not is_page(opened.read(HEAD)):
            raise UserError(f"{named}{file}, which exists and is not a report; name another file")
