"""Preference pairs as tokens: one document a pair, the prompt with the chosen answer, then the prompt with the rejected one.

A document's marks say which tokens are trained on: 1 in the chosen answer, 2 in the rejected one, 0 in prompts. Each half
ends with the last token of its answer, so the second half begins after the last 1.
"""

import json
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.errors import UserError
from distill.text.chat_tokens import WHOSE, Marked, chat_documents
from distill.text.chats import COMPLETION, MESSAGES, PROMPT, written
from distill.text.pairs import CHOSEN, REJECTED
from distill.text.rows import Chat

SECOND = 2  # the mark of a rejected answer


def row_documents(rows: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> list[list[np.ndarray | Marked]]:
    """The documents of each row, a chat or a pair.

    Raises:
        UserError: as `chat_documents`; also where the halves of a pair are the same tokens, or the template writes their
            prompts differently.
    """
    parsed = [json.loads(row) for row in rows]
    halves = [[_half(pair, name) for name in (CHOSEN, REJECTED)] if CHOSEN in pair else None for pair in parsed]
    single = [part for row, both in zip(rows, halves, strict=True) for part in ([row] if both is None else both)]
    documents = iter(chat_documents(single, tokenizer))
    return [
        next(documents) if both is None else [_joined(documents, pair, tokenizer)]
        for pair, both in zip(parsed, halves, strict=True)
    ]


def _half(pair: dict, name: str) -> Chat:
    """The prompt and one answer of a pair, as a chat."""
    said = {"train_on": "completions", "place": f"{pair['place']}, {name}", "row": pair["row"]}
    if MESSAGES not in pair:
        return written({PROMPT: pair[PROMPT], COMPLETION: pair[name], **said})
    kept = {key: value for key, value in pair.items() if key not in (CHOSEN, REJECTED, *said)}
    return written(kept | {MESSAGES: pair[MESSAGES] + pair[name], "first": len(pair[MESSAGES])} | said)


def _joined(documents: Iterator[list[np.ndarray | Marked]], pair: dict, tokenizer) -> Marked:
    place, halves = pair["place"], [_ended(next(documents), pair, tokenizer) for _ in (CHOSEN, REJECTED)]
    (chosen, first), (rejected, second) = halves
    if np.array_equal(chosen, rejected):
        raise UserError(f"{place}: chosen and rejected are the same tokens to {WHOSE}; leave the row out")
    asked = min(int(first.argmax()), int(second.argmax()))
    if MESSAGES in pair and not np.array_equal(chosen[:asked], rejected[:asked]):
        raise UserError(
            f"{place}: the chat template of {WHOSE} writes the prompts of chosen and rejected differently, so they share "
            "none; give both the same turns, or leave the row out"
        )
    marks = np.concatenate([first.astype(np.uint8), SECOND * second.astype(np.uint8)])
    return Marked(np.concatenate([chosen, rejected]), marks, pair["row"], False)


def _ended(documents: Sequence[np.ndarray | Marked], pair: dict, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a half up to the last one of its answer, and whether each is the answer's. Plain text gets the
    tokenizer's end of sequence: where an answer ends is part of what is preferred."""
    if len(documents) != 1:
        raise UserError(
            f"{pair['place']}: the chat template of {WHOSE} changes earlier turns of an answer once others follow; write "
            "answers of one turn, with the turns before it in the prompt"
        )
    half = cast(Marked, documents[0])
    stop = int(np.flatnonzero(half.trained)[-1]) + 1
    ids, trained, end = half.ids[:stop], np.asarray(half.trained[:stop], bool), tokenizer.eos_token_id
    if MESSAGES not in pair and end is not None and ids[-1] != end:
        ids, trained = np.append(ids, np.asarray([end], ids.dtype)), np.append(trained, True)
    return ids, trained
