"""Compares students with their teachers in the results of `distill bench generation`, as JSON and as a table."""

from collections.abc import Mapping, Sequence

from rich.table import Table

TEACHER = "teacher"
COLUMNS = ("model", "context", "batch", "1st, ms", "eager", "graph", "of limit", "cache, MiB", "peak, MiB", "x teacher", "")


def compare(rows: Sequence[dict]) -> None:
    """Add `against_teacher` to each cell of a student: its rates of decoding and of reading prompts, as multiples of the
    teacher's, and the teacher's cache of one sequence as a multiple of the student's."""
    teachers = {row["teacher"]: row for row in rows if row["model"] == TEACHER}
    for row in rows:
        for cell in row["cells"] if row["model"] != TEACHER else ():
            beside = _beside(cell, teachers[row["teacher"]])
            if beside is not None and best(cell) and best(beside):
                cell["against_teacher"] = {
                    "tokens_per_second": best(cell) / best(beside),
                    "prompt_tokens_per_second": _reading(cell) / _reading(beside),
                    "cache_bytes": _cache(beside) / _cache(cell),
                }


def best(cell: Mapping) -> float:
    """A cell's best rate; 0 where there is none."""
    return max(cell.get("eager", 0.0), cell.get("graph", 0.0))


def _reading(cell: Mapping) -> float:
    return cell["batch"] * cell["length"] / cell["first_token_seconds"]


def _cache(cell: Mapping) -> float:
    return cell["cache_bytes"] / cell["batch"]


def _beside(cell: Mapping, row: Mapping) -> Mapping | None:
    """The same measurement of another model; under a paper's protocol the batch sizes may differ."""
    keys = ("protocol", "length") if "protocol" in cell else ("protocol", "length", "batch")
    return next((other for other in row["cells"] if all(other.get(key) == cell.get(key) for key in keys)), None)


def table(result: Mapping) -> Table:
    """What `run` returned, as a table with a line for each model, length and batch."""
    top = result["bandwidth"]
    found = Table(title=f"{result['device']}; limit by {top['bytes_per_second'] / 1e12:.2f} TB/s, {top['source']}", box=None)
    for name in COLUMNS:
        found.add_column(name, justify="left" if name in ("model", "") else "right")
    for row in result["rows"]:
        for cell in row["cells"]:
            found.add_row(row["model"], *_line(cell))
    return found


def _line(cell: Mapping) -> list[str]:
    first = [f"{cell['length']:,}", f"{cell['batch']:,}"]
    said = [cell[key] for key in ("protocol", "not_run", "graph_not_run") if key in cell]
    if cell.get("prompts", cell["batch"]) < cell["batch"]:
        said.append(f"1st scaled up from {cell['prompts']} prompts")
    if "not_run" in cell:
        return [*first, *[""] * 7, "; ".join(said)]
    rates = [f"{cell[key]:,.0f}" if key in cell else "" for key in ("eager", "graph")]
    mib = [f"{cell[key] / 2**20:,.0f}" if cell[key] else "" for key in ("cache_bytes", "peak_bytes")]  # 0: no growth
    share = f"{cell['share']:.0%}" if "share" in cell else ""
    against = cell.get("against_teacher", {})
    for name, reported in cell.get("paper", {}).items() if against else ():
        said.append(f"{name} {against[name]:.2f}x (the paper {reported:g}x)")
    ratio = f"{against['tokens_per_second']:.2f}" if against else ""
    return [*first, f"{1e3 * cell['first_token_seconds']:,.0f}", *rates, share, *mib, ratio, "; ".join(said)]
