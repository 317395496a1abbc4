"""The table of speed, with student and teacher side by side."""

from collections.abc import Mapping

from rich.table import Table

from distill.evaluation.rows import rows_table


def speed_table(judged: Mapping) -> Table:
    """Show student and teacher side by side, by batch and length, and the length from which on the student is faster."""
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
    return rows_table(
        ["batch x length", "1st, ms" if graphs else "1st token, ms", *decode, "peak, MiB", "cache, MiB"], lines
    )


def _pair(cell: Mapping, beside: Mapping, key: str, scale: float, form: str) -> str:
    values = (one.get(key) for one in (cell, beside))
    return " | ".join("-" if value is None else form.format(value * scale) for value in values)
