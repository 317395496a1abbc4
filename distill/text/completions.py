"""Chats rendered by their tokenizer's template, and the characters of the rendering that the assistant said.

Either the template marks these characters itself ({% generation %}), or two renderings are compared for each turn of the
assistant: the chat up to the turn, with a generation prompt, and the chat with the turn. The turn is what the second has
more. Every span must hold what its turn says.

A model sees the same renderings when it answers. Where a template changes an earlier turn once others follow (Qwen3 drops
its thoughts), that turn has a document of its own, which ends with it. The token that ends a turn (<|im_end|>) belongs to
it; the space after that token does not. This runs in a process of its own (`distill.chat`): a template is a program.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from distill.compat import marked_rendering
from distill.text.chats import ASSISTANT, MESSAGES, TOOLS

MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
THOUGHT = re.compile(r"</?think>")
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of messages that hold thoughts
ALL = "or set train_on: all"


class Written(NamedTuple):
    """A document of a chat: its text, and the [start, end) spans that are trained on; None where all of it is."""

    text: str
    spans: list[tuple[int, int]] | None


class CannotMask(ValueError):
    """An error: the assistant's text cannot be located in a rendering. The message has the reason and the fix."""


def documents_of(tokenizer: PreTrainedTokenizerBase, chat: dict[str, Any]) -> list[Written]:
    """The documents that a chat becomes, usually one.

    Args:
        chat: a chat with messages, see `chats`.

    Raises:
        CannotMask: the template leaves out, or changes, what the assistant said. Other errors that the template raises are
            passed on.
    """
    chats = _Chat(tokenizer, chat)
    whole = chats.rendered(len(chat[MESSAGES]))
    if chat["train_on"] == "all":
        return [Written(whole, None)]
    answers = [k for k, message in enumerate(chat[MESSAGES]) if message["role"] == ASSISTANT]
    asked = [k for k in answers if k >= chat["first"]]
    if chats.marks and (found := _marked(chats, whole, answers, asked)) is not None:
        return [found]
    return _compared(chats, whole, asked)


class _Chat:
    """A chat and its template."""

    def __init__(self, tokenizer, chat: dict[str, Any]) -> None:
        self._tokenizer, self.messages = tokenizer, chat[MESSAGES]
        self._tools, self._options = chat.get(TOOLS), chat.get("options", {})
        self.marks = MARKER.search(tokenizer.get_chat_template(tools=self._tools)) is not None
        added = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        self._added = tuple(sorted((token for token in added if token.strip()), key=len, reverse=True))

    def rendered(self, count: int, answer: bool = False) -> str:
        """The first `count` messages. answer: with a generation prompt after them."""
        options = {**self._options, "add_generation_prompt": answer, "tokenize": False}
        return self._tokenizer.apply_chat_template(self.messages[:count], tools=self._tools, **options)

    def marked(self) -> tuple[str, list[tuple[int, int]]]:
        """The rendering of the whole chat, and the spans between the template's markers."""
        return marked_rendering(self._tokenizer, self.messages, self._tools, self._options)

    def end_of(self, text: str, start: int, end: int) -> int:
        """The exact end of a turn that ends at about `end`: after the token that ends it, before the space after that."""
        said, behind = text[start:end].rstrip(), text[end:]
        if said.endswith(self._added):
            return start + len(said)
        return end + len(next((token for token in self._added if behind.startswith(token)), ""))

    def last_token(self, text: str) -> int:
        """Where the last added or special token of a text ends; 0 where it has none."""
        return max((text.rfind(token) + len(token) for token in self._added if token in text), default=0)


def _marked(chats: _Chat, whole: str, answers: Sequence[int], asked: Sequence[int]) -> Written | None:
    """The document by the template's markers; None where these do not hold each of the assistant's turns."""
    text, places = chats.marked()
    if text != whole or len(places) != len(answers):
        return None
    if any(_lacks(text[start:end], chats.messages[k]) for k, (start, end) in zip(answers, places, strict=True)):
        return None
    spans = []
    for k, (start, end) in zip(answers, places, strict=True):
        if k in asked:
            after = chats.rendered(k + 1)  # text after that belongs to the next turn
            spans.append((start, chats.end_of(after if text.startswith(after) else text, start, end)))
    return Written(text, spans)


def _compared(chats: _Chat, whole: str, asked: Sequence[int]) -> list[Written]:
    """The documents by comparing renderings. The whole chat is one document, with the turns that it holds unchanged; each
    other turn has a document of its own, after the messages before it."""
    inside, alone = [], []
    for k in asked:
        if k == 0:
            raise CannotMask(f"cannot open the assistant's turn with nothing before it; begin with the user's, {ALL}")
        before, after = chats.rendered(k, answer=True), chats.rendered(k + 1)
        if not after.startswith(before):
            raise CannotMask(
                f"does not begin the assistant's turn (message {k + 1}) with its generation prompt, so what was said cannot "
                f"be located; mend it, with {{% generation %}} markers for example, {ALL}"
            )
        start, end = len(before), chats.end_of(after, len(before), len(after))
        if lost := _lacks(after[start:end], chats.messages[k]):
            raise CannotMask(
                f"does not write all of the assistant's turn (message {k + 1}): {lost!r} is missing; mend the template, or "
                f"write the turn as the template wants it, {ALL}"
            )
        if not whole.startswith(after[:end]):  # perhaps only the text after a chat's last turn differs
            shared = _shared(after, whole)
            shorter = chats.last_token(after[:shared])
            if shorter <= start or _lacks(after[start:shorter], chats.messages[k]):
                alone.append(Written(after, [(start, end)]))
                continue
            end = shorter
        inside.append((start, end))
    return [*([Written(whole, inside)] if inside else []), *alone]


def _shared(one: str, other: str) -> int:
    """The length of the beginning that two texts share."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    low, high = 0, length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def _lacks(span: str, message: dict[str, Any]) -> str | None:
    """The first part of a turn that its span lacks, where parts must come in order; None where it holds all. A template may
    change the space around thoughts and at the borders of a turn."""
    place = 0
    for part in _said(message):
        found = span.find(part, place)
        if found < 0:
            return part[:40]
        place = found + len(part)
    for call in message.get("tool_calls", []):
        inner = call.get("function", call)
        for part in (inner["name"], *_leaves(inner.get("arguments"))):
            if not any(way in span for way in (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])):
                return part[:40]
    return None


def _said(message: dict[str, Any]) -> list[str]:
    """The texts of a turn in their order: thoughts, and what comes before, between and after their tags."""
    thoughts = next((message[name] for name in REASONING if isinstance(message.get(name), str)), "")
    return [part.strip() for part in (thoughts, *THOUGHT.split(message["content"])) if part.strip()]


def _leaves(value: Any) -> list[str]:
    """All texts in a value, with those inside its mappings and lists."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in (str(key), *_leaves(inner))]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return [value] if isinstance(value, str) else []
