"""The borders of documents in a row of tokens: the opening token and the end tokens. A chat's turns end without a border."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.chat import render

TURNS = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
SHORT = 8  # tokens: a document of at most SHORT is left out if it holds only space, as after a chat's last turn
FURTHER = 3  # tokens after a beginning of text that must match for a chat to go on there


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer puts before a text (BOS), or none. A model that was trained with it needs it."""
    first = tokenizer("a")["input_ids"][:1]
    return first if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def opened(ids: Sequence[int], start: Sequence[int]) -> list[int]:
    """The tokens with the opening exactly once: it is added where it is missing, and a second one is removed."""
    ids, start = list(ids), list(start)
    if start and ids[: len(start)] != start:
        return start + ids
    return ids[len(start) :] if start and ids[: 2 * len(start)] == 2 * start else ids


def prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text for a model to continue: with the opening once, without an end token that the tokenizer adds."""
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = opened(tokenizer(text)["input_ids"], opening(tokenizer))
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] != bare[-1:] else ids


class Documents:
    """Cuts the tokens of a row of text into its documents: a new one begins after every end of text.

    An end token that the tokenizer's chat template writes between two turns is no border: the chat goes on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> None:
        """ends: the tokens that end a text."""
        self._ends, self._start = sorted(set(ends)), opening(tokenizer)
        self._decode: Callable[[list[int]], str] = cast(Any, tokenizer).decode
        self._frame = {*ends, tokenizer.bos_token_id}
        self._turns = _turns(tokenizer)

    def __call__(self, ids: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """The documents of a row, each with the tokenizer's opening and with its own end; empty ones are left out."""
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
    """The tokens that the chat template writes between two turns: an end of sequence, and all up to the next added or
    special token. A beginning of text there could also begin a document, so FURTHER tokens after it must match too."""
    if not getattr(tokenizer, "chat_template", None) or tokenizer.eos_token_id is None:
        return []
    try:
        said = [{"role": role, "content": text} for role, text in TURNS]
        ids = tokenizer(render(tokenizer, said, "the teacher"), add_special_tokens=False)["input_ids"]
    except Exception:  # a template may require other roles, and raise any exception
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
