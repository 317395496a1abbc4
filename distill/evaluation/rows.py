"""The rows of every table: teacher, student, ablations, window-only control (twin) and untrained baselines."""

from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from distill.build import build
from distill.evaluation.baselines import (
    SINKS,
    WINDOW,
    has_window_branch,
    uniform_window,
    window_everywhere,
    window_layout,
)
from distill.evaluation.knockouts import has_branches, knocked_out
from students.config import Layout
from students.skeleton import Student
from teachers.teacher import Teacher

TITLES = {
    "teacher": "teacher",
    "student": "student",
    "no_state": "ablation: states set to zero",
    "no_window": "ablation: windows set to zero",
    "twin": "window-only control (twin), trained the same",
    "window_layout": f"untrained windows of {WINDOW} + {SINKS} in the same layers",
    "uniform_window": f"untrained windows of {WINDOW} + {SINKS}, attention evenly spread",
    "window_everywhere": f"untrained windows of {WINDOW} + {SINKS} in every layer",
}
NAMES = {  # short names, for tables of 80 columns
    "teacher": "teacher",
    "student": "student",
    "no_state": "no states",
    "no_window": "no windows",
    "twin": "control",
    "window_layout": "same layers",
    "uniform_window": "even layers",
    "window_everywhere": "all layers",
}
KNOCKOUTS = ("no_state", "no_window")  # the student without one of its branches: evaluation.knockouts


def rows_of(
    teacher: Teacher, student: Callable[[], Student], layout: Layout, twin: Callable[[], Student] | None
) -> dict[str, Callable[[], Student | None]]:
    """Return a maker of each row's model. Untrained models share the teacher's weights, ablations the student's."""

    rows: dict[str, Callable[[], Student | None]] = {"teacher": lambda: None, "student": student}
    if has_branches(student()):
        rows["no_state"] = lambda: knocked_out(student(), state=True)
        rows["no_window"] = lambda: knocked_out(student(), state=False)
    if twin is not None and has_window_branch(layout):
        rows["twin"] = twin
    return rows | {row: _untrained(teacher, found) for row, found in layouts(layout).items()}


def layouts(layout: Layout) -> dict[str, Layout]:
    """Return the layout of each untrained row, for a student of this layout."""
    found = {"window_layout": window_layout(layout), "uniform_window": uniform_window(layout)}
    found["window_everywhere"] = window_everywhere(layout)
    return {row: one for row, one in found.items() if one is not None}


def _untrained(teacher: Teacher, layout: Layout) -> Callable[[], Student]:
    return lambda: build(teacher, layout)[0]


def rows_left_out(student: Student, twin: bool) -> list[dict]:
    """Return the rows that are missing, with the reasons."""
    layout = student.layout
    left_out: dict[str, str] = {}
    if not has_branches(student):
        left_out |= dict.fromkeys(KNOCKOUTS, "none of the student's mixers has two branches")
    if not has_window_branch(layout):
        left_out["twin"] = "the student has no window branch"
    elif not twin:
        left_out["twin"] = "it was not trained; `twin: true` in a recipe trains it"
    if uniform_window(layout) is None:
        left_out["uniform_window"] = "the student's own layout is uniform, or keeps no attention"
    return [{"rows": [row], "evaluation": "every", "part": "", "reason": reason} for row, reason in left_out.items()]


def rows_table(columns: Sequence[str], lines: Mapping[str, Sequence[str]]) -> Table:
    """Make a table with one line a row, the student's in bold."""
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row, cells in lines.items():
        table.add_row(NAMES.get(row, row), *cells, style="bold" if row == "student" else "")
    return table


def decimal(value: float | None, places: int) -> str:
    """Format a number; None stands for one beyond 1e300."""
    return "beyond 1e300" if value is None else f"{value:.{places}f}"


def error_of(error: float | None, places: int, before: str = " ± ") -> str:
    """Format a standard error as it follows a number; empty if there is none."""
    return "" if error is None else f"{before}{error:.{places}f}"


def difference_of(found: Mapping, places: int) -> str:
    """Format a paired difference with its standard error, see `pairing.paired`."""
    return f"{found['difference']:+.{places}f}{error_of(found['error'], places)}"


def lower_on(found: Mapping) -> str:
    """Format the number of documents on which the first of a pair is lower."""
    return f"{found['lower']} of {found['documents']}"


def completion_cells(found: Mapping | None) -> list[str]:
    """Format KL, agreement and bits a byte on completions, see `fidelity.completions`; blank if there are none."""
    if not found:
        return ["", "", ""]
    bits = found["bits_per_byte"]
    return [f"{found['kl']:.3f}", f"{found['agreement']:.1%}", "" if bits is None else f"{bits:.3f}"]


def told(measured: Mapping) -> str:
    """Describe a fidelity in one line, for the log of a run."""
    kl, found = measured["kl"], decimal(measured["perplexity"], 2)
    answers = f"   KL on completions {measured['completions']['kl']:.3f}" if measured.get("completions") else ""
    return f"held-out KL {kl:.3f}   agreement {measured['agreement']:.1%}   perplexity {found}{answers}"
