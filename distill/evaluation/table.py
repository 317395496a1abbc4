"""The output of `distill eval`: tables that fit into 80 columns, and what was not run."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from distill.console import bold
from distill.errors import printable
from distill.evaluation.rows import NAMES, TITLES
from distill.evaluation.suites import EVALUATIONS, evaluation
from distill.text.overlap import sentence, verdict


def show(judged: Mapping, console: Console) -> None:
    """Print every table that the results fill."""
    where = f"  {judged['pattern']}  on {judged['device']}, {judged['precision']}"
    console.print(bold(judged["suite"]).append(printable(where), "not bold"))
    for _, title, table in tables(judged):
        console.print()
        console.print(bold(title))
        console.print(table)
    console.print(f"\n  {overlap_line(judged)}")
    for row in judged["rows"]:
        if NAMES[row] != TITLES[row]:
            console.print(f"  {NAMES[row]}: {TITLES[row]}")
    for entry in judged["not_run"]:
        where = " ".join(part for part in (entry["evaluation"], entry["part"]) if part and part != "every")
        rows = ", ".join(NAMES.get(row, row) for row in entry["rows"])
        console.print(f"  not run: {f'{where} ({rows})' if where else rows}: {entry['reason']}")


def overlap_line(judged: Mapping) -> str:
    """Describe how much of the held-out text is training text, or that it is unknown; empty for older results."""
    if "overlap" not in judged:
        return ""
    found = judged["overlap"]
    if found is None:
        return "it is not known whether the held-out text is training text: the training text is not available"
    return f"overlap of held-out and training text: {sentence(found)}: {verdict(found)}"


def tables(judged: Mapping) -> list[tuple[str, str, Table]]:
    """Return every table with its evaluation and its title."""
    measured = [name for name in EVALUATIONS if judged["rows"]["teacher"].get(name)]
    return [(name, title, table) for name in measured for title, table in evaluation(name).tables(judged)]
