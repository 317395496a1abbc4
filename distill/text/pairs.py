"""Rows that are preference pairs: a `prompt` with a `chosen` and a `rejected` answer, all text or all lists of messages.

The prompt may also be the common beginning of both answers, as in many published sets. A prompt in plain text next to
answers in messages is then ignored; where the answers have no common beginning, it is the user's turn. Other rows go to
`chats`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

from distill.errors import UserError, brief
from distill.text import chats
from distill.text.chats import ASSISTANT, BESIDE, MESSAGES, PROMPT, beside, messages_of, written

CHOSEN, REJECTED = "chosen", "rejected"
PAIRS = "pairs"  # the value of `train_on` that a stage that reads pairs gives its sources
FORM = "write prompt, chosen and rejected, all text or all messages"


def columns_of(column: str, names: Collection[str], train_on: str | None) -> list[str]:
    """The columns to read, as `chats.columns_of`; those of a pair where pairs are read, or where the file has no others."""
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
    """A record as a row, as `chats.row_of`; a pair becomes the JSON of its prompt, both answers, place and row.

    Raises:
        UserError: the record is no pair where pairs are read, or a pair elsewhere. The message names the place and the fix.
    """
    pair = columns[0] == CHOSEN
    if train_on != PAIRS and not pair:
        return chats.row_of(record, train_on, place, number, columns, names)
    if train_on != PAIRS:
        raise UserError(
            f"{place}: this is a pair (chosen, rejected), but single texts or chats are read here; name the file under "
            "`data` of a stage that reads pairs, or write messages, or prompt and completion"
        )
    if not pair:
        raise UserError(f"{place}: this is not a pair: it has {', '.join(map(str, record))}; {FORM}")
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
        shared -= answers[CHOSEN][shared - 1 : shared] == " "  # a space belongs to the word after it
        prompt = answers[CHOSEN][:shared]
        answers = {name: answer[shared:] for name, answer in answers.items()}
    if not prompt.strip():
        raise _unshared(place)
    for name, answer in answers.items():
        if not answer.strip():
            raise UserError(f"{place}: {name} is empty after the prompt that both begin with; leave the row out")
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
            raise UserError(f"{place}: {name} is empty after the prompt that both begin with; leave the row out")
        if messages[0]["role"] != ASSISTANT:
            raise UserError(
                f"{place}: {name} continues the shared prompt with a turn of {messages[0]['role']!r}, not the assistant's; "
                "give both the same turns up to the assistant's, or leave the row out"
            )
    return {MESSAGES: asked, **said}


def _unshared(place: str) -> UserError:
    return UserError(
        f"{place}: chosen and rejected share no prompt: the column prompt has no text, and they begin differently; {FORM}"
    )


def _alike(one: Sequence, other: Sequence) -> int:
    """The number of characters, or messages, at the beginning of two answers that are the same."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
