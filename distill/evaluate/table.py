"""What `distill eval` prints: tables that are readable in 80 columns, and what was not run."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from distill.evaluate.rows import TITLES
from distill.evaluate.suites import SIX

NAMES = {
    "teacher": "teacher",
    "student": "student",
    "twin": "its twin",
    "window_layout": "own layout",
    "uniform_window": "uniform",
    "window_everywhere": "windows",
}
TASK_NAMES = {
    "winogrande": "WinoGr.",
    "arc_easy": "ARC-E",
    "arc_challenge": "ARC-C",
    "piqa": "PIQA",
    "hellaswag": "HellaSw.",
    "lambada": "LAMBADA",
}
FAMILY_NAMES = {
    "key_value": "key-value",
    "associative": "assoc.",
    "induction": "induct.",
    "phone_book": "phone b.",
    "variable_tracking": "variables",
}


def show(judged: Mapping, console: Console) -> None:
    """Print every table that the results fill."""
    console.print(f"[bold]{judged['suite']}[/]  {judged['pattern']}  on {judged['device']}, {judged['precision']}")
    for _, title, table in tables(judged):
        console.print(f"\n[bold]{title}[/]")
        console.print(table)
    console.print()
    for row in judged["rows"]:
        if NAMES[row] != TITLES[row]:
            console.print(f"  {NAMES[row]}: {TITLES[row]}")
    for entry in judged["not_run"]:
        where = " ".join(part for part in (entry["evaluation"], entry["part"]) if part and part != "every")
        rows = ", ".join(NAMES.get(row, row) for row in entry["rows"])
        console.print(f"  not run: {where or 'any'} ({rows}): {entry['reason']}")


def tables(judged: Mapping) -> list[tuple[str, str, Table]]:
    """For each table the evaluation it shows, its title, and itself."""
    first = judged["rows"]["teacher"]
    found = [("fidelity", "fidelity on held-out text, KL in nats a token", _fidelity(judged["rows"]))]
    if first.get("passkey"):
        found.append(("passkey", "passkeys recalled, by length (share of the teacher's)", _passkey(judged)))
    for length in sorted({cell["length"] for cells in first.get("recall", {}).values() for cell in cells}):
        found.append(("recall", f"recall at {length} tokens, % of answers", _recall(judged["rows"], length)))
    scored = [task for task, result in first.get("tasks", {}).items() if "score" in result]
    six, further = [task for task in scored if task in SIX], [task for task in scored if task not in SIX]
    if six:
        found.append(("tasks", f"tasks, % ± standard error, {_items(first, six)}", _tasks(judged, six, recovery=True)))
    for start in range(0, len(further), 6):
        part = further[start : start + 6]
        found.append(
            ("tasks", f"further tasks, % ± standard error, {_items(first, part)}", _tasks(judged, part, recovery=False))
        )
    if "speed" in first:
        found.append(("speed", "speed, student | teacher", _speed(judged)))
    return found


def _table(columns: Sequence[str], lines: Mapping[str, Sequence[str]]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row, cells in lines.items():
        table.add_row(NAMES.get(row, row), *cells, style="bold" if row == "student" else "")
    return table


def _fidelity(rows: Mapping) -> Table:
    lines = {}
    for row, results in rows.items():
        found = results["fidelity"]
        lines[row] = [
            f"{found['kl']:.3f}" + (f"±{found['kl_error']:.3f}" if row != "teacher" else ""),
            f"{found['agreement']:.1%}",
            f"{found['perplexity']:.2f}",
            f"{found['ece']:.3f}",
            f"{found['rank']:.1f}",
            f"{found['overlap']:.1%}",
            f"{found['kendall']:.3f}",
        ]
    return _table(["", "KL", "agree", "perplexity", "ECE", "rank", "top 5", "tau of 10"], lines)


def _passkey(judged: Mapping) -> Table:
    lines = {}
    for row, results in judged["rows"].items():
        shares = [cell["share"] for cell in judged["against_teacher"].get(row, {}).get("passkey", [])]
        shares = shares or [None] * len(results["passkey"])
        lines[row] = [
            f"{cell['recalled']}/{cell['trials']}" + ("" if share is None else f" ({share:.0%})")
            for cell, share in zip(results["passkey"], shares, strict=True)
        ]
    return _table(["", *(str(cell["length"]) for cell in judged["rows"]["teacher"]["passkey"])], lines)


def _recall(rows: Mapping, length: int) -> Table:
    families = list(rows["teacher"]["recall"])
    lines = {}
    for row, results in rows.items():
        if "recall" in results:
            cells = [[cell for cell in results["recall"][family] if cell["length"] == length] for family in families]
            lines[row] = [
                f"{sum(cell['recalled'] for cell in found) / sum(cell['trials'] for cell in found):.0%}" for found in cells
            ]
    return _table(["", *(FAMILY_NAMES.get(family, family) for family in families)], lines)


def _tasks(judged: Mapping, tasks: Sequence[str], recovery: bool) -> Table:
    lines = {}
    for row, results in judged["rows"].items():
        if "tasks" in results:
            cells = [results["tasks"][task] for task in tasks]
            lines[row] = [_score(cell["score"], cell["error"]) for cell in cells]
            if recovery:
                found = judged["against_teacher"].get(row, {}).get("recovery", {"score": None})
                lines[row].append("" if found["score"] is None else _score(found["score"], found["error"]))
    lines["chance"] = [f"{100 * judged['chance'][task]:.1f}" for task in tasks] + ([""] if recovery else [])
    beside = [judged["against_teacher"]["student"].get("tasks", {}).get(task) for task in tasks]
    lines["win or tie"] = ["" if one is None else f"{100 * one['win_or_tie']:.1f}" for one in beside]
    lines["win or tie"] += [""] if recovery else []
    names = [TASK_NAMES.get(task, task) for task in tasks]
    return _table(["", *names, *(["recovery"] if recovery else [])], lines)


def _score(value: float, error: float | None) -> str:
    places = 1 if error is None or error < 0.1 else 0
    return f"{100 * value:.1f}" + ("" if error is None else f"±{100 * error:.{places}f}")


def _items(results: Mapping, tasks: Sequence[str]) -> str:
    counts = sorted({results["tasks"][task]["items"] for task in tasks})
    return f"{counts[0]} items each" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} items each"


def _speed(judged: Mapping) -> Table:
    own, other = (judged["rows"][row]["speed"]["cells"] for row in ("student", "teacher"))
    lines, graphs = {}, any(key.startswith("graph_") for cell in [*own, *other] for key in cell)
    for cell, beside in zip(own, other, strict=True):
        if "not_run" not in cell or "not_run" not in beside:
            lines[f"{cell['batch']} x {cell['length']}"] = [
                _pair(cell, beside, "first_token_seconds", 1e3, "{:.0f}"),
                _pair(cell, beside, "decode_tokens_per_second", 1, "{:.0f}"),
                *([_pair(cell, beside, "graph_decode_tokens_per_second", 1, "{:.0f}")] if graphs else []),
                _pair(cell, beside, "peak_bytes", 2**-20, "{:.0f}"),
                _pair(cell, beside, "cache_bytes", 2**-20, "{:.1f}"),
            ]
    for found in judged["against_teacher"]["student"]["speed"]:
        keys = ("first_token", "decode", *(("graph_decode",) if graphs else ()))
        crossing = ["-" if key not in found else f"from {found[key]}" if found[key] else "never" for key in keys]
        lines[f"faster, batch {found['batch']}"] = [*crossing, "", ""]
    decode = ["tok/s eager", "tok/s graph"] if graphs else ["decode, tokens/s"]
    return _table(["batch x length", "1st, ms" if graphs else "1st token, ms", *decode, "peak, MiB", "cache, MiB"], lines)


def _pair(cell: Mapping, beside: Mapping, key: str, scale: float, form: str) -> str:
    values = (one.get(key) for one in (cell, beside))
    return " | ".join("-" if value is None else form.format(value * scale) for value in values)
