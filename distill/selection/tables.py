"""The printed result of a selection: its cost, ranking, layout, and the recall of the untrained layout."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill.errors import printable
from distill.selection.periodic import cost_line
from students.config import KEEP

MORE = 8  # rows of the ranking shown after the last kept one
TITLES = {
    "teacher": "teacher",
    "chosen": "chosen layout, untrained",
    "even": "as much attention evenly spread, untrained",
    "free": "the free choice, untrained",
}


def strip(pattern: str) -> Text:
    """A layout as one line with highlighted mixers."""
    return Text.assemble(*((letter, "" if letter == KEEP else "bold blue") for letter in printable(pattern)))


def show(chosen: Mapping[str, Any], console: Console) -> None:
    """Print the result of a selection; `chosen` as `resolve` returns it."""
    cost = chosen["cost"]
    console.print(
        f"selected by {chosen['by']}: {cost['tokens']:,} tokens in {cost['seconds']:,.0f} s (predicted "
        f"{cost['predicted_seconds']:,.0f} s)",
        highlight=False,
    )
    if any(entry["score"] is not None for entry in chosen["ranking"]):
        console.print(ranking_table(chosen))
    console.print(models_table(chosen["models"]))
    console.print(Text.assemble("layers   ", strip(chosen["pattern"]), "   (A keeps the teacher's attention)"))
    if chosen["heads"] is not None:
        heads = "; ".join(f"{layer}: {', '.join(map(str, heads))}" for layer, heads in chosen["heads"].items())
        console.print(f"heads    {heads}", highlight=False)
    if found := chosen.get("periodic"):
        console.print(f"periodic {cost_line(found, chosen['models'])}", highlight=False)
    if chosen["note"]:
        console.print(f"note     {chosen['note']}")


def ranking_table(chosen: Mapping[str, Any]) -> Table:
    """A table of layers or heads by score: the kept ones and the next few."""
    entries = chosen["ranking"]
    names = list(entries[0]["numbers"])
    table = Table(box=None, header_style="bold")
    for column in ("rank", "head" if chosen["heads"] is not None else "layer", "score", *names, ""):
        table.add_column(column, justify="right")
    last = max((index for index, entry in enumerate(entries) if entry["kept"]), default=0)
    for index, entry in enumerate(entries[: last + 1 + MORE]):
        numbers = [f"{entry['numbers'][name]:.4g}" for name in names]
        table.add_row(str(index + 1), entry["name"], f"{entry['score']:.4g}", *numbers, "kept" if entry["kept"] else "")
    if len(entries) > last + 1 + MORE:
        table.add_row("", f"and {len(entries) - last - 1 - MORE} more", *[""] * (len(names) + 2))
    return table


def models_table(models: Mapping[str, Mapping[str, float]]) -> Table:
    """A table of recall and KL of the teacher and of untrained layouts: the chosen one, an even one, and, where the chosen
    one is periodic, the free choice."""
    table = Table(box=None, header_style="bold")
    table.add_column("")
    for column in ("recall, greedy", "forced choice, nats a token", "held-out KL"):
        table.add_column(column, justify="right")
    for name, numbers in ((name, models[name]) for name in TITLES if models.get(name)):
        table.add_row(TITLES[name], f"{numbers['recalled']:.0%}", f"{numbers['choice']:.3f}", f"{numbers['kl']:.4f}")
    return table
