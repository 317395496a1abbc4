"""Reports: one HTML file a run or a comparison. They load nothing, and are read on a phone, in the dark, on paper.

page.py is what all have in common, run_page.py and comparison.py what each holds; tables.py, svg.py, matrices.py, curves.py,
recall.py and layout.py draw. `distill.report(run)` and `distill report RUN` write them again from what a run folder holds.
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
    """Write the report of one run again, or compare several on one page; see `distill.report`."""
    if not runs:
        raise UserError("no run folder is named; `distill report RUN`, or several to compare")
    folders = [RunDir.existing(run) for run in runs]
    if len(folders) == 1 and out is None:
        return write_report(folders[0])
    target, named = Path(out or COMPARISON), "--out is " if out else ""
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"{named}{target}, which is a folder or is in none; name a file in a folder that exists")
    _check_ours(target, named)
    with shown(folders):
        page = run_page(folders[0]) if len(folders) == 1 else compare_page(folders)
    write_text(target, printable(page))
    return target


def write_report(folder: RunDir) -> Path:
    """Write report.html and report.md of a run, finished or not; the HTML file's path.

    Raises:
        UserError: a file that it is made of is damaged, or it cannot be written.
    """
    target = folder.path / "report.html"
    with shown([folder]):
        page, text = run_page(folder), markdown_report(folder, evaluations_of(folder))
    write_text(target, printable(page))
    write_text(folder.path / "report.md", printable(text))
    return target


def add_judgement(folder: RunDir, judged: Mapping, console: Console) -> None:
    """Keep what a suite found in its run's folder, and write the report again; where the folder cannot be written to, as
    a run of somebody else's, say so."""

    def add(evaluations: dict) -> None:
        evaluations["suites"] = {**evaluations.get("suites", {}), judged["suite"]: judged}

    try:
        folder.change("evaluations.json", add)
        write_report(folder)
    except UserError as error:
        console.print(f"  these results are not kept in the run folder: {error}")


@contextmanager
def shown(folders: Sequence[RunDir]) -> Iterator[None]:
    """Say of results that are each in their form, but do not go together, whose they are.

    Raises:
        UserError: naming the folders, and what failed.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        places = ", ".join(str(folder.path / "evaluations.json") for folder in folders)
        raise UserError(
            f"what {places} holds does not go together, so that nothing can be shown of it: it was edited, or another "
            "version of distill wrote it; delete it, and the same `distill run` judges again (--debug shows what failed)"
        ) from error


def _check_ours(file: Path, named: str) -> None:
    """Refuse to write over what is no report.

    Raises:
        UserError: naming the file.
    """
    refuse_other(file)  # opening a pipe would wait for a writer
    if not file.exists():
        return
    with file.open("rb") as opened:
        if not is_page(opened.read(HEAD)):
            raise UserError(f"{named}{file}, which exists and is no report; name another file")
