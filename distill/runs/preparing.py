"""The command `distill prepare`: prepares the texts of a recipe before a run, without the teacher's weights."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill.console import bold
from distill.errors import printable
from distill.loading import load_tokenizer
from distill.recipe import Recipe
from distill.runs.texts import text_windows, training_windows
from distill.stages.texts import texts_of
from distill.text.preparation import Tokenising
from distill.text.prepared import Prepared
from distill.text.windows import Windows

OPEN, CLOSE, BAR = "⟦", "⟧", "|"  # around trained tokens, and between tokens
MOST = 1024  # the most tokens of a document that are shown


def prepare_texts(recipe: Recipe, processes: int | None, console: Console, shown: int = 0) -> dict[str, Any]:
    """Prepare every text that a run of a recipe reads, held-out text first.

    Args:
        processes: the number that tokenise; None: chosen by the cores and the size of each text. console: shows progress.
            shown: the number of documents of each text that are shown token by token.

    Returns:
        for each text, by the key of its sources: folder, tokens, documents, shards, sha256 (of its tokens), and windows by
        their length; for text with chats also trained (number of trained tokens), cut and left_out (numbers of chats, by
        the length of windows); with `shown` also shown, a list of {label, row, tokens (as strings), trained}, where row is
        the row of a chat in its file.

    Raises:
        UserError: the teacher's tokenizer cannot be read, or a text cannot be prepared.
    """
    tokenizer, how = load_tokenizer(recipe), Tokenising(processes, console)
    heldout = text_windows(recipe, tokenizer, "heldout", how=how)
    made = {"data.heldout": _facts(heldout, tokenizer, shown)}
    keys: dict[tuple, str] = {}  # for each text, the key of the sources that name it first
    for text in texts_of(recipe):
        windows, where = training_windows(recipe, tokenizer, text, how=how), keys.setdefault(text.sources, text.where)
        facts = made.get(where) or made.setdefault(where, _facts(windows, tokenizer, shown))
        _add_length(facts, windows)
    return made


def _facts(windows: Windows, tokenizer, shown: int) -> dict[str, Any]:
    meta = windows.meta
    counts = {"tokens": meta.tokens, "documents": meta.documents, "shards": len(meta.shards), "sha256": meta.sha256}
    facts: dict[str, Any] = {"folder": str(windows.folder), **counts, "windows": {}}
    if windows.prepared.marked:
        facts |= {"trained": windows.prepared.trained, "cut": {}, "left_out": {}}
    if shown:
        facts["shown"] = [_shown(windows.prepared, number, tokenizer) for number in range(min(shown, meta.documents))]
    _add_length(facts, windows)
    return facts


def _add_length(facts: dict[str, Any], windows: Windows) -> None:
    """Add the counts of windows of another length over the same text."""
    length = str(windows.seq_len)
    facts["windows"][length] = windows.count
    if windows.prepared.marked:
        facts["cut"][length], facts["left_out"][length] = windows.cut, windows.left_out
        facts.setdefault("fitted", {})[length] = windows.fitted


def _shown(text: Prepared, number: int, tokenizer) -> dict[str, Any]:
    """A document as a list of tokens, with the trained ones marked."""
    shard = next(shard for shard in reversed(text.shards) if shard.first_document <= number)
    index = number - shard.first_document
    start = shard.first + int(shard.starts[index])
    stop = start + min(int(shard.lengths[index]), MOST)
    tokens = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in text.read(start, stop).tolist()]
    label = text.meta.labels[int(shard.labels[index])]
    marks = text.marks(start, stop).astype(bool).tolist()
    return {"label": label, "row": int(shard.rows[index]), "tokens": tokens, "trained": marks}


def print_prepared(prepared: dict[str, Any], recipe: Recipe, console: Console) -> None:
    """Print the result of `prepare_texts`."""
    console.print(bold(recipe.name))
    table = Table(box=None, header_style="bold")
    for column in ("text", "tokens", "documents", "shards", "windows", "folder"):
        table.add_column(column, justify="left" if column in ("text", "windows", "folder") else "right")
    for where, facts in prepared.items():
        windows = ", ".join(f"{count:,} of {length}" for length, count in facts["windows"].items())
        counts = [f"{facts[name]:,}" for name in ("tokens", "documents", "shards")]
        table.add_row(where, *counts, windows, printable(facts["folder"]))
    console.print(table)
    for where, facts in prepared.items():
        if "trained" in facts:
            console.print(f"{where}: {facts['trained']:,} of {facts['tokens']:,} tokens are trained on")
        for said in filter(None, facts.get("fitted", {}).values()):
            console.print(f"{where}: {printable(said)}", style="yellow")
    for where, facts in prepared.items():
        for document in facts.get("shown", []):
            _print_document(where, document, console)


def _print_document(where: str, document: dict[str, Any], console: Console) -> None:
    """Print a document with a bar between its tokens. Trained tokens are in brackets, and green on a terminal."""
    row = f", row {document['row']}" if document["row"] else ""
    said = Text(f"\n{where}: {printable(document['label'])}{row}\n", style="bold")
    before = False
    for token, trained in zip([*document["tokens"], ""], [*document["trained"], False], strict=True):
        border = {(False, True): OPEN, (True, False): CLOSE}.get((before, trained), BAR)
        said.append(border, style="dim" if border == BAR else "bold green")
        said.append(printable(token), style="green" if trained else "")
        before = trained
    console.print(said, soft_wrap=True)
