"""Comparison of two models' vocabularies: next-token distributions can be compared only over the same vocabulary."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from teachers.checks import loading
from teachers.quiet import no_panics
from teachers.source import resolve

SPECIAL = ("bos_token", "eos_token", "unk_token")  # no model learns from padding, so its token may differ


def tokenizer_of(reference: str, trust_remote_code: bool = False, allow_pickle: bool = False) -> PreTrainedTokenizerBase:
    """Load a teacher's tokenizer without its weights.

    Raises:
        FileNotFoundError, ValueError: as `teachers.load`.
    """
    from transformers import AutoTokenizer

    source = resolve(reference, allow_pickle)
    location = source.location
    read: Callable[..., Any] = partial(AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)
    if source.kind == "gguf":
        from teachers import gguf, gguf_tokenizer

        location, read = str(gguf.converted(Path(location))), gguf_tokenizer.load
    with loading(reference, "tokenizer"), no_panics():
        return read(location)


def vocabulary_difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """Describe the first token, or special token, in which two tokenizers differ; None if their vocabularies are equal."""
    own, other = ({number: token for token, number in each.get_vocab().items()} for each in (ours, theirs))
    for number in sorted(own.keys() | other.keys()):
        if own.get(number) != other.get(number):
            one, two = (repr(each[number]) if number in each else "nothing" for each in (own, other))
            return f"token {number} is {one} here and {two} there ({len(own):,} tokens here, {len(other):,} there)"
    for name in SPECIAL:
        mine, their = (getattr(each, name, None) for each in (ours, theirs))
        if mine is not None and their is not None and str(mine) != str(their):
            return f"{name} is {str(mine)!r} here and {str(their)!r} there"
    return None
