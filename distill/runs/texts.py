"""The texts of a recipe, prepared and cut into windows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.errors import UserError
from distill.memory import enough_memory
from distill.recipe import Recipe, TextSource
from distill.stages.texts import StageText, tokens_read, usual_text
from distill.text.pair_windows import PairWindows
from distill.text.preparation import Tokenising, prepare
from distill.text.windows import Windows


def text_windows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, part: str, make: bool = True, how: Tokenising | None = None
) -> Windows:
    """The training or held-out text in windows. make: whether to prepare it if it is not prepared; see `prepare`."""
    if part == "train":
        return training_windows(recipe, tokenizer, usual_text(recipe), make, how)
    options, data = recipe.evaluation, recipe.data
    limit = 4 * (options.final_tokens or options.tokens) if _endless(data.heldout) else None
    folder = _prepared(recipe, tokenizer, data.heldout, "data.heldout", limit, make, how)
    length = "data.seq_len" if options.seq_len is None else "evaluation.seq_len"
    windows = Windows(folder, options.seq_len or data.seq_len, None, key=length, where="data.heldout")
    _check_tokens(windows, tokenizer, "data.heldout")
    return windows


def training_windows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, text: StageText, make: bool = True, how: Tokenising | None = None
) -> Windows:
    """A training text in windows. `data.limit` applies to each text. make: as in `text_windows`."""
    data, limit = recipe.data, recipe.data.limit
    if limit is None and _endless(text.sources):
        limit = tokens_read(recipe, text.sources)
    folder = _prepared(recipe, tokenizer, text.sources, text.where, limit, make, how)
    kind = PairWindows if text.pairs else Windows
    windows = kind(folder, text.seq_len, recipe.seed, data.long_documents == "in_order", text.length_key, text.where)
    _check_tokens(windows, tokenizer, text.where)
    return windows


def _endless(sources: Sequence[TextSource]) -> bool:
    """Whether sources may be too large to prepare completely: data sets of the hub, and mixtures."""
    return any(source.hub or source.weight for source in sources)


def _prepared(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[TextSource],
    where: str,
    limit: int | None,
    make: bool,
    how: Tokenising | None,
) -> Path:
    data = recipe.data
    options: dict[str, Any] = {"separator": data.separator, "seed": recipe.seed, "limit": limit, "make": make, "how": how}
    lower = f"data.longest_document (now {data.longest_document:,} bytes), and cut or leave out longer documents"
    with enough_memory(f"{where}: preparing the text", lower):
        return prepare(sources, tokenizer, where=where, longest=data.longest_document, **options)


def _check_tokens(windows: Windows, tokenizer: Any, where: str) -> None:
    """Refuse text whose documents all have one token, and text with tokens that the tokenizer does not have.

    No token of such documents has a next one, so every loss and KL would be 0.

    Raises:
        UserError: naming the recipe's key.
    """
    text = windows.prepared
    if text.longest < 2:
        raise UserError(
            f"{where}: no token of this text can be scored: each of its {text.meta.documents:,} documents is one token "
            "long, so no token has a next one in its document; name text with longer documents"
        )
    if (highest := text.highest) > (last := max(tokenizer.get_vocab().values())):
        raise UserError(
            f"{where}: the prepared text in {windows.folder} has a token {highest}, but the tokenizer's last one is {last}; "
            "delete that folder, and the same command makes it again"
        )
