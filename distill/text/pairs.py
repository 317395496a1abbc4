"""Rows that are pairs: a `prompt`, and a `chosen` and a `rejected` answer to it, all text or all lists of messages.

The prompt may be what both answers begin with, as in many published sets; a prompt in plain text beside answers in messages
is then left alone, or is the user's turn where they do not begin alike. Other rows are `chats`'.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

from distill.errors import UserError, brief
from distill.text import chats
from distill.text.chats import ASSISTANT, BESIDE, MESSAGES, PROMPT, beside, messages_of, written

CHOSEN, REJECTED = "chosen", "rejected"
PAIRS = "pairs"  # as `train_on`: what a stage that reads pairs gives its sources
FORM = "write prompt, chosen and rejected, all text or all messages"


def columns_of(column: str, names: Collection[str], train_on: str | None) -> list[str]:
    """As `chats.columns_of`; of a file of pairs, and of every one that has nothing else, those of pairs."""
    both = {CHOSEN, REJECTED} <= set(names)
    found = [] if train_on == PAIRS and both else chats.columns_of(column, names)
    if found or not both:
        return found
    return [CHOSEN, REJECTED, *(name for name in (PROMPT, *BESIDE) if name in names)]


def row_of(
    record: Mapping[str, Any],
    train_on: str | None,
    place: str,
    number: int,
    columns: Sequence[str],
    names: Iterable[str],
) -> str | None:
    """As `chats.row_of`; a pair as the JSON of its prompt, both answers, place and row.

    Raises:
        UserError: it is no pair, or one where none is read, naming the place and the fix.
    """
    pair = columns[0] == CHOSEN
    if train_on != PAIRS and not pair:
        return chats.row_of(record, train_on, place, number, columns, names)
    if train_on != PAIRS:
        raise UserError(
            f"{place}: this is a pair (chosen, rejected), and what reads it here reads single texts or chats; name the file "
            "under `data` of a stage that reads pairs, or write messages, or prompt and completion"
        )
    if not pair:
        raise UserError(f"{place}: this is no pair: it has {', '.join(map(str, record))}; {FORM}")
    return written(_pair(record, place) | beside(record, place) | {"place": place, "row": number})


def _pair(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    prompt, answers = record.get(PROMPT), {name: record.get(name) for name in (CHOSEN, REJECTED)}
    for name, answer in answers.items():
        if not answer or (isinstance(answer, str) and not answer.strip()):
            raise UserError(f"{place}: {name} is empty; leave the row out, or write what was answered")
    if answers[CHOSEN] == answers[REJECTED]:
        raise UserError(f"{place}: chosen and rejected are equal, so neither is preferred; leave the row out")
    if all(isinstance(answer, str) for answer in answers.values()) and (prompt is None or isinstance(prompt, str)):
        return _texts(prompt, cast(dict[str, str], answers), place)
    if all(isinstance(answer, list) for answer in answers.values()) and (prompt is None or isinstance(prompt, str | list)):
        return _chats(prompt, cast(dict[str, list], answers), place)
    given = ", ".join(f"{name} {brief(value, 40)}" for name, value in {PROMPT: prompt, **answers}.items())
    raise UserError(f"{place}: {given}; {FORM}")


def _texts(prompt: str | None, answers: dict[str, str], place: str) -> dict[str, Any]:
    if prompt is None:
        shared = _alike(*answers.values())
        shared -= answers[CHOSEN][shared - 1 : shared] == " "  # a space belongs to the word behind it
        prompt = answers[CHOSEN][:shared]
        answers = {name: answer[shared:] for name, answer in answers.items()}
    if not prompt.strip():
        raise _unshared(place)
    for name, answer in answers.items():
        if not answer.strip():
            raise UserError(f"{place}: {name} is empty behind the prompt that both begin with; leave the row out")
    return {PROMPT: prompt, **answers}


def _chats(prompt: str | list | None, answers: dict[str, list], place: str) -> dict[str, Any]:
    said = {name: messages_of(answer, place, name) for name, answer in answers.items()}
    if isinstance(prompt, list):
        asked = messages_of(prompt, place, PROMPT) if prompt else []
    else:
        shared = _alike(*said.values())
        asked = said[CHOSEN][:shared]
        said = {name: messages[shared:] for name, messages in said.items()}
        if not asked and prompt is not None and prompt.strip():
            asked = [{"role": "user", "content": prompt}]
    if not asked:
        raise _unshared(place)
    for name, messages in said.items():
        if not messages:
            raise UserError(f"{place}: {name} is empty behind the prompt that both begin with; leave the row out")
        if messages[0]["role"] != ASSISTANT:
            raise UserError(
                f"{place}: {name} goes on behind the shared prompt with a turn of {messages[0]['role']!r}, so the two share "
                "no prompt to the end; give both the same turns up to the assistant's, or leave the row out"
            )
    return {MESSAGES: asked, **said}


def _unshared(place: str) -> UserError:
    return UserError(
        f"{place}: chosen and rejected share no prompt: the column prompt has no text, and they begin differently; {FORM}"
    )


def _alike(one: Sequence, other: Sequence) -> int:
    """How many characters, or messages, two answers begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
