"""Reports: one HTML file a run or a comparison. They load nothing, and are read on a phone, in the dark, on paper.

page.py is what all have in common, run_page.py and comparison.py what each holds; tables.py, svg.py, matrices.py, curves.py,
recall.py and layout.py draw. `distill.report(run)` and `distill report RUN` write them again from what a run folder holds.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from rich.console import Console

from distill.errors import UserError
from distill.reports.comparison import compare_page
from distill.reports.run_page import run_page
from distill.reports.tables import headline, headline_cells, markdown_report
from distill.runs.run_dir import RunDir, write_text

__all__ = ["add_judgement", "headline", "headline_cells", "write_report", "write_reports"]
COMPARISON = "comparison.html"
JUDGEMENT = {"suite", "device", "precision", "pattern", "rows", "against_teacher", "chance", "layers", "not_run"}


def write_reports(runs: Sequence[str | PathLike], out: str | Path | None = None) -> Path:
    """Write the report of one run again, or compare several on one page; see `distill.report`."""
    if not runs:
        raise UserError("no run folder is named; `distill report RUN`, or several to compare")
    folders = [RunDir.existing(run) for run in runs]
    for folder in folders:
        _check_judgements(folder)
    target = Path(out) if out else None
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        raise UserError(f"--out is {target}, which is a folder or is in none; name a file in a folder that exists")
    if len(folders) == 1 and target is None:
        return write_report(folders[0])
    target = target or Path(COMPARISON)
    write_text(target, run_page(folders[0]) if len(folders) == 1 else compare_page(folders))
    return target


def write_report(folder: RunDir) -> Path:
    """Write report.html and report.md of a run, finished or not; the HTML file's path."""
    target = folder.path / "report.html"
    write_text(target, run_page(folder))
    write_text(folder.path / "report.md", markdown_report(folder, folder.read("evaluations.json", {})))
    return target


def add_judgement(folder: RunDir, judged: Mapping, console: Console) -> None:
    """Keep what a suite found in its run's folder, and write the report again; where the folder cannot be written to, as
    a run of somebody else's, say so."""
    suites = folder.read("evaluations.json", {}).get("suites", {})
    try:
        folder.update("evaluations.json", suites={**suites, judged["suite"]: judged})
        write_report(folder)
    except UserError as error:
        console.print(f"  these results are not kept in the run folder: {error}")


def _check_judgements(folder: RunDir) -> None:
    """Refuse results that lack what `distill.evaluate` documents, as early development versions wrote them."""
    evaluations = folder.read("evaluations.json", {})
    for name, judged in {"final": evaluations.get("final"), **evaluations.get("suites", {})}.items():
        if judged is not None and (missing := sorted(JUDGEMENT - set(judged))):
            file = folder.path / "evaluations.json"
            raise UserError(
                f"{file}: {name} lacks {', '.join(missing)}: another version of distill wrote it; use that one, "
                "or run again with --fresh"
            )
