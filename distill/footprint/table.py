"""The tables and remarks on stages in a printed plan."""

from collections.abc import Iterator, Mapping

from rich.table import Table

from distill.footprint.needs import GIB, Need
from distill.moments import EIGHT_BIT


def stage_table(tokens: Mapping[str, int], trained: Mapping[str, int], needs: Mapping[str, Need]) -> Table:
    """A table with one row for each stage: tokens and trained parameters, and for training stages windows at a time, GiB on
    each GPU, tokens/s and GPU hours."""
    table = Table(box=None, header_style="bold")
    columns = ["stage", "tokens", "trained parameters"]
    for column in columns + (["windows", "GiB", "tokens/s", "GPU hours"] if needs else []):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, count in tokens.items():
        row = [stage, f"{count:,}", f"{trained[stage]:,}"]
        need = needs.get(stage)
        if need is not None:
            memory = "?" if need.footprint is None else f"{need.footprint.peak / GIB:.1f}"
            rate = "?" if need.tokens_per_second is None else f"{need.tokens_per_second:,.0f}"
            row += [str(need.windows), memory, rate, "?" if need.hours is None else f"{need.hours:.1f}"]
        table.add_row(*row)
    return table


def remarks(needs: Mapping[str, Need], gpus: int, gib: float) -> Iterator[str]:
    """Lines on the parts of the memory, on stages that do not fit, and on the sources of the rates."""
    for stage, need in needs.items():
        if need.footprint is not None:
            names = ("teacher", "student", "gradients", "moments", "activations")
            said = {"moments": "moments (8 bits)"} if need.optimizer == EIGHT_BIT else {}
            parts = ", ".join(f"{said.get(name, name)} {getattr(need.footprint, name) / GIB:.1f}" for name in names)
            yield f"GiB         {stage}: {parts}{f' on each of {gpus} GPUs' if gpus > 1 else ''}"
        else:
            yield f"GiB         {stage}: cannot be computed without running it"
        if need.lower:
            yield f"            {stage} does not fit {gib:g} GiB: {need.lower}"
        yield f"            {stage}: tokens/s {need.said}"
