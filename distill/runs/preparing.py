"""`distill prepare`: the texts of a recipe prepared before a run asks for them, without its teacher's weights."""

from typing import Any

from rich.console import Console
from rich.table import Table

from distill.console import bold
from distill.errors import printable
from distill.loading import load_tokenizer
from distill.recipe import Recipe
from distill.runs.texts import text_windows, training_windows
from distill.stages.texts import texts_of
from distill.text.preparation import Tokenising
from distill.text.windows import Windows


def prepare_texts(recipe: Recipe, processes: int | None, console: Console) -> dict[str, Any]:
    """Prepare every text that a run of a recipe reads, held-out text first.

    Args:
        processes: that tokenise; by the cores and the size of each text where None. console: where progress is shown.

    Returns:
        by the key of its sources: folder, tokens, documents, shards, sha256 (of its tokens), and windows by their length.

    Raises:
        UserError: a teacher without a tokenizer that can be read, or a text that cannot be prepared.
    """
    tokenizer, how = load_tokenizer(recipe), Tokenising(processes, console)
    made = {"data.heldout": _facts(text_windows(recipe, tokenizer, "heldout", how=how))}
    keys: dict[tuple, str] = {}  # of each text, where it is first read
    for text in texts_of(recipe):
        windows, where = training_windows(recipe, tokenizer, text, how=how), keys.setdefault(text.sources, text.where)
        facts = made.setdefault(where, _facts(windows))
        facts["windows"][str(text.seq_len)] = windows.count
    return made


def _facts(windows: Windows) -> dict[str, Any]:
    meta = windows.meta
    counts = {"tokens": meta.tokens, "documents": meta.documents, "shards": len(meta.shards), "sha256": meta.sha256}
    return {"folder": str(windows.folder), **counts, "windows": {str(windows.seq_len): windows.count}}


def show(prepared: dict[str, Any], recipe: Recipe, console: Console) -> None:
    """Print what was prepared."""
    console.print(bold(recipe.name))
    table = Table(box=None, header_style="bold")
    for column in ("text", "tokens", "documents", "shards", "windows", "folder"):
        table.add_column(column, justify="left" if column in ("text", "windows", "folder") else "right")
    for where, facts in prepared.items():
        windows = ", ".join(f"{count:,} of {length}" for length, count in facts["windows"].items())
        counts = [f"{facts[name]:,}" for name in ("tokens", "documents", "shards")]
        table.add_row(where, *counts, windows, printable(facts["folder"]))
    console.print(table)
