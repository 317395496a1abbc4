"""Chats as tokens, with a mark on each token that is trained on; marked tokens are decoded and compared with the answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.chat import limited
from distill.errors import UserError, brief
from distill.text.chats import COMPLETION, MESSAGES, PROMPT
from distill.text.completions import CannotMask, Written, documents_of
from distill.text.encoding import opening
from distill.text.rows import Chat

WHOSE = "the teacher's tokenizer"


@dataclass(frozen=True)
class Marked:
    """A document of which only some tokens are trained on.

    trained: whether each of `ids` is trained on. row: the number of its row in its file. unended: the document ends with a
    completion that has no end token of its own, so that the end-of-document token is trained on too.
    """

    ids: np.ndarray
    trained: np.ndarray
    row: int
    unended: bool

    def __len__(self) -> int:
        return len(self.ids)


def chat_documents(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> list[list[np.ndarray | Marked]]:
    """Returns the documents of each chat: plain token ids where all of the chat is trained on, else `Marked`.

    Raises:
        UserError: the tokenizer has no chat template or gives no character offsets, or the template fails or does not write
            what the assistant said. The message names file, row and fix.
    """
    parsed = [json.loads(chat) for chat in chats]
    written = _written([chat for chat in parsed if MESSAGES in chat], tokenizer)
    found = []
    for chat in parsed:
        documents = next(written) if MESSAGES in chat else [_pair(chat)]
        found.append([_tokens(document, chat, tokenizer) for document in documents])
    return found


def _pair(chat: dict[str, Any]) -> Written:
    """A prompt in plain text and its completion."""
    text = chat[PROMPT] + chat[COMPLETION]
    return Written(text, None if chat["train_on"] == "all" else [(len(chat[PROMPT]), len(text))])


def _written(chats: list[dict[str, Any]], tokenizer):
    """An iterator over the documents of each chat."""
    if chats and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{chats[0]['place']}: {WHOSE} has no chat template to write messages with; name a teacher that has one (an "
            "instruct model), or write the rows as text, or as a prompt and a completion in plain text"
        )
    return iter(_rendered(chats, tokenizer) if chats else [])


def _rendered(chats: list[dict[str, Any]], tokenizer) -> list[list[Written]]:
    """The documents of chats, many rendered in one process; where that fails, one by one, so that the row can be named."""

    def work() -> str:
        return json.dumps([_tried(tokenizer, chat) for chat in chats])

    try:
        answers = json.loads(limited(work, WHOSE, "leave the row out, or mend the template"))
    except UserError as error:
        if len(chats) > 1:
            return [_rendered([chat], tokenizer)[0] for chat in chats]
        raise UserError(f"{chats[0]['place']}: {error}") from error
    for chat, (reason, _) in zip(chats, answers, strict=True):
        if reason is not None:
            raise UserError(f"{chat['place']}: the chat template of {WHOSE} {reason}")
    return [[Written(*document) for document in documents] for _, documents in answers]


def _tried(tokenizer, chat: dict[str, Any]) -> tuple[str | None, list[Written]]:
    """Render a chat. Returns why it failed, or None, and its documents."""
    try:
        return None, documents_of(tokenizer, chat)
    except CannotMask as error:
        return str(error), []
    except RecursionError:
        return "calls itself without end; leave the row out, or mend the template", []
    except MemoryError:
        raise
    except Exception as error:  # a template may raise any exception
        said = brief(" ".join(str(error).split()), 200).strip("'\"") or type(error).__name__
        return f"refuses it: {said}; change the row's turns as the template wants them, or leave the row out", []


def _tokens(document: Written, chat: dict[str, Any], tokenizer) -> np.ndarray | Marked:
    """A document's tokens; a prompt in plain text also gets the special tokens that the tokenizer puts around a text."""
    plain, place = MESSAGES not in chat, chat["place"]
    text, spans = document
    if spans is not None and not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{place}: {WHOSE} is a slow one, which does not give the characters of each token; name a teacher with a "
            "fast tokenizer (tokenizer.json), or set train_on: all"
        )
    try:
        read = tokenizer(text, add_special_tokens=plain, return_offsets_mapping=spans is not None, verbose=False)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        raise UserError(f"{place}: {WHOSE} fails on this row: {' '.join(str(error).split())}; leave it out") from error
    ids = np.asarray(read["input_ids"], np.uint32)
    extra = _twice_opened(ids, tokenizer) if plain else 0
    if spans is None:
        return ids[extra:]
    trained = np.zeros(len(ids), bool)
    first, last = _places(read["offset_mapping"])
    for start, end in spans:
        inside = (last > start) & (first < end) & (last > first)
        if plain and len(ids) and ids[-1] == tokenizer.eos_token_id:
            inside[-1] = True
        _prove(ids[inside], text[start:end], place, tokenizer)
        trained |= inside
    unended = bool(trained[-1]) and int(ids[-1]) not in {*tokenizer.added_tokens_decoder, tokenizer.eos_token_id}
    return Marked(ids[extra:], trained[extra:], chat["row"], unended)


def _twice_opened(ids: np.ndarray, tokenizer) -> int:
    """How many tokens to drop where a text already begins with the opening token and the tokenizer adds a second one."""
    start = opening(tokenizer)
    return len(start) if start and ids[: 2 * len(start)].tolist() == 2 * start else 0


def _places(offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """The first character of each token, and the one after its last. Some tokenizers leave leading space out of a token's
    span: a token of space alone then has an empty span where the next token begins, and gets the character before it."""
    places = np.asarray(offsets, np.int64).reshape(-1, 2)
    first, last = places[:, 0], places[:, 1]
    return np.where((first == last) & (last > 0), last - 1, first), last


def _prove(ids: np.ndarray, said: str, place: str, tokenizer) -> None:
    """Refuse tokens that do not decode to what was said, either unchanged or as the tokenizer encodes and decodes it."""

    def decoded(tokens: Sequence[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    found = decoded(ids.tolist())
    if said.strip() in found:
        return
    again = decoded(tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"])
    if again.strip() not in found:
        raise UserError(
            f"{place}: the tokens of what the assistant said decode to {brief(found)}, but it said {brief(said)}; leave the "
            "row out, or set train_on: all"
        )
