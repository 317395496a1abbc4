"""Reads and tokenizes prompts: rows with a prompt, or chats without their last answer."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from distill.chat import limited
from distill.errors import UserError, brief, named
from distill.recipe import TextSource
from distill.text.chat_tokens import WHOSE
from distill.text.chats import ASSISTANT, COMPLETION, MESSAGES, OPTIONS, PAIR, PROMPT, PROMPTS, TOOLS
from distill.text.data_sets import data_set, said
from distill.text.files import files_of
from distill.text.readers import read
from distill.text.records import Reading
from distill.text.rows import Chat, Rows

AT_ONCE = 256  # chats that are rendered in one process
TEXT = "text"


@dataclass(frozen=True)
class Prompt:
    """A chat up to the turn that a model answers.

    row: its number among all prompts, from 0. reference: the answer that the row itself has. label: its source's label.
    place: file and row, for error messages. tools, options: for the template.
    """

    row: int
    messages: list[dict[str, Any]]
    reference: str | None
    label: str
    place: str
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] | None = None

    def beside(self) -> dict[str, Any]:
        """The further columns of a row that is written with an answer."""
        found = {TOOLS: self.tools, OPTIONS: self.options}
        return {name: value for name, value in found.items() if value} | {"source": self.label}


def prompts_of(sources: Sequence[TextSource], where: str, longest: int, limit: int | None) -> list[Prompt]:
    """The prompts of some sources, in their order.

    Args:
        where: the key or option that names the sources. longest: the most bytes that a row may have. limit: the most
            prompts.

    Raises:
        UserError: a file cannot be read, a row has no prompt, or there is no prompt at all.
    """
    found: list[Prompt] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, source in enumerate(sources):
            column = PROMPTS if source.column in (TEXT, PAIR) else source.column
            asked = source.model_copy(update={"column": column, "train_on": "all"})
            for name, row, label, text in _read(asked, f"{where}.{number}", Path(scratch) / str(number), longest):
                if limit is not None and len(found) >= limit:
                    return found
                found.append(_prompt(text, label, len(found), f"{name}, row {row}"))
    if not found:
        raise UserError(f"{where} holds no prompt; name files of rows with a prompt, or with messages")
    return found


def _read(source: TextSource, where: str, scratch: Path, longest: int) -> Iterator[tuple[str, int, str, str]]:
    """Every row of a source: the file, the number in it from 1, the label, and the text."""
    files = files_of(source, where)
    if source.path is None:
        hub = cast(str, source.hub)
        with said(where, hub, files, longest):
            for number, row in enumerate(data_set(source, files, where, scratch, longest), start=1):
                yield hub, number, row["label"], Chat(row["text"]) if row["chat"] else row["text"]
    for file in files if source.path is not None else ():
        rows, options = Rows(scratch), (source.column, source.label, source.documents or "file", longest, scratch)
        try:
            read(Reading(file, where, *options, train_on="all"), rows)
        finally:
            rows.close()
        for number, (label, text) in enumerate(rows.read(range(rows.count)), start=1):
            yield named(file.path), number, label, text


def digest(prompts: Sequence[Prompt]) -> str:
    """A hash of all prompts, with their references and template options."""
    said = hashlib.sha256()
    for one in prompts:
        said.update(json.dumps([one.messages, one.reference, one.beside()], sort_keys=True).encode() + b"\n")
    return said.hexdigest()


def _prompt(text: str, label: str, row: int, place: str) -> Prompt:
    """A row as a prompt; the row is a chat as JSON, or a question in plain text."""
    if not isinstance(text, Chat):
        if not text.strip():
            raise UserError(f"{place}: it has no prompt; write one, or leave the row out")
        return Prompt(row, [{"role": "user", "content": text}], None, label, place)
    chat = json.loads(text)
    place = chat.get("place") or place
    if MESSAGES not in chat:  # a prompt and its completion, both in plain text
        return Prompt(row, [{"role": "user", "content": chat[PROMPT]}], chat[COMPLETION], label, place)
    messages, first, reference = chat[MESSAGES], chat["first"], None
    if not first and messages[-1]["role"] == ASSISTANT:
        first = len(messages) - 1
    if first:
        reference, messages = messages[first]["content"], messages[:first]
    if all(message["role"] in ("system", "developer") for message in messages) or messages[-1]["role"] == ASSISTANT:
        raise UserError(f"{place}: no turn that asks something comes before the answer; leave the row out")
    return Prompt(row, messages, reference, label, place, chat.get(TOOLS), chat.get("options"))


def tokens_of(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, room: int | None, tokens: int
) -> list[list[int]]:
    """The tokens of each prompt, rendered by the chat template with a generation prompt.

    Args:
        room: the positions that the model has; None where they are not known. tokens: the most new tokens.

    Raises:
        UserError: there is no template, it refuses a prompt, or a prompt leaves no room for the answer. The message names
            the row.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{prompts[0].place}: {WHOSE} has no chat template to write prompts with; name a teacher that has one (an "
            "instruct model)"
        )
    found: list[list[int]] = []
    for start in range(0, len(prompts), AT_ONCE):
        found += _written(prompts[start : start + AT_ONCE], tokenizer)
    for prompt, ids in zip(prompts, found, strict=True):
        if room is not None and len(ids) + tokens > room:
            raise UserError(
                f"{prompt.place}: the prompt is {len(ids):,} tokens and --tokens is {tokens:,}, but the model has positions "
                f"for {room:,}; lower --tokens, or leave the row out"
            )
    return found


def _written(prompts: Sequence[Prompt], tokenizer) -> list[list[int]]:
    """The tokens of prompts, many rendered in one process; where that fails, one by one, so that the row can be named."""

    def work() -> str:
        return json.dumps([_rendered(one, tokenizer) for one in prompts])

    try:
        texts = json.loads(limited(work, WHOSE, "leave the row out, or mend the template"))
    except UserError as error:
        if len(prompts) > 1:
            return [_written([one], tokenizer)[0] for one in prompts]
        raise UserError(f"{prompts[0].place}: {error}") from error
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for prompt, ids in zip(prompts, found, strict=True):
        if not ids:
            raise UserError(f"{prompt.place}: the template writes nothing of {brief(prompt.messages)}; leave the row out")
    return found


def _rendered(prompt: Prompt, tokenizer) -> str:
    options = {"add_generation_prompt": True, "tokenize": False, **(prompt.options or {})}
    return tokenizer.apply_chat_template(prompt.messages, tools=prompt.tools, **options)
