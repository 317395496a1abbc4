"""What a tokenizer has to say where text becomes tokens: what a text opens with, and where one ends and the next begins."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.chat import render

TURNS = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
SHORT = 8  # tokens of which no more may be nothing but space, as behind a chat's last turn
FURTHER = 3  # tokens that must follow a beginning of text for a chat to go on behind it


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer itself puts before a text, if it does: a model trained with it needs it."""
    first = tokenizer("a")["input_ids"][:1]
    return first if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def opened(ids: Sequence[int], start: Sequence[int]) -> list[int]:
    """Tokens that begin with the opening once: a text that brings it along needs no second, one without it gets it."""
    ids, start = list(ids), list(start)
    if start and ids[: len(start)] != start:
        return start + ids
    return ids[len(start) :] if start and ids[: 2 * len(start)] == 2 * start else ids


def prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text to go on from: opened once, and not ended, whatever the tokenizer puts around a text."""
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = opened(tokenizer(text)["input_ids"], opening(tokenizer))
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] != bare[-1:] else ids


class Documents:
    """Cuts the tokens of a row of text into its documents: behind every end of text, a new one begins.

    An end that the tokenizer's chat template writes between two turns is none: it ends a turn, and the chat goes on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> None:
        """ends: the tokens that end a text."""
        self._ends, self._start = sorted(set(ends)), opening(tokenizer)
        self._decode: Callable[[list[int]], str] = cast(Any, tokenizer).decode
        self._frame = {*ends, tokenizer.bos_token_id}
        self._turns = _turns(tokenizer)

    def __call__(self, ids: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """The documents of a row, each opened as the tokenizer opens a text and with the end that it has; empty ones are
        left out."""
        ids, begin = self._opened(np.asarray(ids)), 0
        found = np.zeros(max(len(ids) - 1, 0), bool)
        for end in self._ends:
            found |= ids[:-1] == end
        for place in np.flatnonzero(found).tolist():
            if not self._goes_on(ids, place):
                yield from self._document(ids[begin : place + 1])
                begin = place + 1
        yield from self._document(ids[begin:])

    def _opened(self, ids: np.ndarray) -> np.ndarray:
        count = 2 * len(self._start)
        if not count or (ids[: len(self._start)].tolist() == self._start and ids[:count].tolist() != 2 * self._start):
            return ids
        return np.concatenate([np.asarray(opened(ids[:count].tolist(), self._start), ids.dtype), ids[count:]])

    def _goes_on(self, ids: np.ndarray, place: int) -> bool:
        return any(ids[place : place + len(turn)].tolist() == turn for turn in self._turns)

    def _document(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        if len(ids) > SHORT or self._decode([token for token in ids.tolist() if token not in self._frame]).strip():
            yield self._opened(ids)


def _turns(tokenizer) -> list[list[int]]:
    """What the chat template writes at the border of two turns: an end of sequence and all up to the next token that is no
    text. A beginning of text there may just as well begin a document, so that what follows it counts too."""
    if not getattr(tokenizer, "chat_template", None) or tokenizer.eos_token_id is None:
        return []
    try:
        said = [{"role": role, "content": text} for role, text in TURNS]
        ids = tokenizer(render(tokenizer, said, "the teacher"), add_special_tokens=False)["input_ids"]
    except Exception:  # a template may ask for roles of its own, and raise whatever it likes
        return []
    marks, found = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids), []
    for place in (place for place, token in enumerate(ids) if token == tokenizer.eos_token_id):
        behind = next((after for after in range(place + 1, len(ids)) if ids[after] in marks), None)
        if behind is None:
            continue
        last = behind + FURTHER if ids[place + 1] == tokenizer.bos_token_id else behind
        if last < len(ids) and ids[place : last + 1] not in found:
            found.append(ids[place : last + 1])
    return found
