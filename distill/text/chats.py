"""Rows that are chats (`messages`, or a `prompt` and its `completion`): checked, and written as JSON for the tokenizer.

The JSON of a chat has messages (role, content and any other key that a template may read), tools and options (of the
template) where the row has them, first (the index of the first message that counts as a completion), train_on, place (file
and row, for error messages) and row (its number in the file). A prompt in plain text has prompt and completion in place of
messages.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from distill.errors import UserError, brief, named, nearest
from distill.text.rows import Chat

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
PAIR = f"{PROMPT}+{COMPLETION}"  # a value of `column`: these two columns
PROMPTS = f"{MESSAGES} or {PROMPT}"  # a value of `column`: the one that the file has, for prompts that a model answers
TOOLS, OPTIONS = "tools", "chat_template_kwargs"
BESIDE = (TOOLS, OPTIONS)  # further columns of a chat
ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
OTHERS = {"human": "user", "gpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT, "function": "tool"}  # of other formats
OURS = frozenset({"add_generation_prompt", "chat_template", "continue_final_message", "return_dict", "tokenize", TOOLS})
WRITE = 'write {"role": ..., "content": ...}'


def columns_of(column: str, names: Collection[str]) -> list[str]:
    """The columns to read where a source names `column` and the file has the columns `names`; empty where it lacks `column`.

    A source that names no column (text) also reads messages, or prompt and completion, where the file has no text. Prompts
    that a model answers need no completion.
    """
    if column == PROMPTS:
        wanted = next(([name] for name in (MESSAGES, PROMPT) if name in names), [])
        if wanted == [PROMPT] and COMPLETION in names:
            wanted.append(COMPLETION)
        return wanted and [*wanted, *(name for name in BESIDE if name in names)]
    if column == PAIR or (column == "text" and "text" not in names and MESSAGES not in names):
        wanted = [PROMPT, COMPLETION]
    else:
        wanted = [MESSAGES if column == "text" and "text" not in names else column]
    if not set(wanted) <= set(names):
        return []
    return [*wanted, *(name for name in BESIDE if name in names)]


def row_of(
    record: Mapping[str, Any],
    train_on: str | None,
    place: str,
    number: int,
    columns: Sequence[str],
    names: Iterable[str],
) -> str | None:
    """A record as a row: its text, or a `Chat`; None where its column is null.

    Args:
        columns: from `columns_of`. place: file and row, for messages. number: the row's number in its file. names: the
            file's columns.

    Raises:
        UserError: the record is neither. The message names the place and the fix.
    """
    said = {"train_on": train_on or "completions", "place": place, "row": number}
    if len(columns) > 1 and columns[:2] == [PROMPT, COMPLETION]:
        if record.get(PROMPT) is None and record.get(COMPLETION) is None:
            return None
        return written(_pair(record.get(PROMPT), record.get(COMPLETION), place) | beside(record, place) | said)
    value = record.get(columns[0])
    if columns[0] == MESSAGES and isinstance(value, str):
        value = _parsed(value, place, MESSAGES)
    if isinstance(value, list) and (columns[0] == MESSAGES or any(isinstance(one, Mapping) for one in value)):
        messages = messages_of(value, place, columns[0])
        if said["train_on"] == "completions" and all(message["role"] != ASSISTANT for message in messages):
            raise UserError(f"{place}: no turn of {columns[0]} is the assistant's; leave the row out, or set train_on: all")
        return written({MESSAGES: messages, "first": 0} | beside(record, place) | said)
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{place}: the column {columns[0]!r} holds {type(value).__name__}, not text ({brief(value)}); there are "
            f"{_listed(names)}"
        )
    if value is not None and train_on == "completions":
        raise UserError(
            f"{place}: train_on is completions, but the column {columns[0]!r} holds text, which has no completions; name a "
            f"column of messages, or {PAIR}, or set train_on: all"
        )
    return value


def _listed(names: Iterable[str]) -> str:
    names = [named(name, 40) for name in names]
    return ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")


def written(chat: dict[str, Any]) -> Chat:
    return Chat(json.dumps(chat, ensure_ascii=False))


def _pair(prompt: object, completion: object, place: str) -> dict[str, Any]:
    """A prompt and its completion: two texts, or two lists of messages that follow each other."""
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise UserError(f"{place}: completion is empty; leave the row out, or write what the assistant said")
        return {PROMPT: prompt, COMPLETION: completion}
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise UserError(
            f"{place}: prompt is {brief(prompt)} and completion {brief(completion)}; both should be text, or both lists of "
            "messages"
        )
    before, behind = messages_of(prompt, place, PROMPT), messages_of(completion, place, COMPLETION)
    if all(message["role"] != ASSISTANT for message in behind):
        raise UserError(f"{place}: no turn of completion is the assistant's; leave the row out, or give it that role")
    return {MESSAGES: before + behind, "first": len(before)}


def beside(record: Mapping, place: str) -> dict[str, Any]:
    """The tools and template options of a row, where it has them."""
    found, tools, options = {}, record.get(TOOLS), record.get(OPTIONS)
    if isinstance(tools, str) and tools.strip():
        tools = _parsed(tools, place, TOOLS)
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise UserError(f"{place}: tools is {brief(tools)}; it should be a list of JSON schemas of functions")
        found[TOOLS] = [_without_nulls(tool) for tool in tools]
    if options:
        if not isinstance(options, Mapping) or OURS & set(options):
            raise UserError(
                f"{place}: {OPTIONS} is {brief(options)}; it should be a mapping of what the template itself reads, without "
                f"{', '.join(sorted(OURS))}"
            )
        found["options"] = _without_nulls(options)
    return found


def _parsed(text: str, place: str, column: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {column} is text that is not JSON ({error}): {brief(text)}; {WRITE} in a list") from error


def messages_of(values: list, place: str, column: str) -> list[dict[str, Any]]:
    if not values:
        raise UserError(f"{place}: {column} holds no message; leave the row out")
    return [_message(value, f"{place}: message {number} of {column}") for number, value in enumerate(values, start=1)]


def _message(value: object, where: str) -> dict[str, Any]:
    """A message whose content is text, without keys that are null: columnar files give every message the keys of all."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {brief(value)}, not a message; {WRITE}")
    message = _without_nulls(value)
    if "role" not in message:
        raise UserError(f"{where} has no role, but {', '.join(map(str, message)) or 'nothing'}; {WRITE}")
    if message["role"] not in ROLES:
        role = message["role"]
        fix = f"write {OTHERS[role]!r}" if isinstance(role, str) and role in OTHERS else nearest(brief(role, 40), ROLES)
        raise UserError(f"{where} has the unknown role {brief(role)}; {fix}")
    if (calls := message.get("tool_calls")) is not None:
        message["tool_calls"] = _calls(calls, where)
        if not message["tool_calls"]:
            del message["tool_calls"]
    message["content"] = _content(message.get("content"), where, "tool_calls" in message)
    if message["role"] == ASSISTANT and not message["content"].strip() and "tool_calls" not in message:
        raise UserError(f"{where} is the assistant's, and empty; leave the row out, or write what the assistant said")
    return message


def _content(content: object, where: str, optional: bool) -> str:
    """Text, or the texts of a list of parts, joined."""
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise UserError(f"{where} holds {brief(kind if kind else part)}, which is not text; leave the row out")
        return "".join(part["text"] for part in content)
    if content is None and optional:
        return ""
    if not isinstance(content, str):
        raise UserError(f"{where} has the content {brief(content)}, which is not text; {WRITE}")
    return content


def _calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as a mapping, which templates expect."""
    if not isinstance(calls, list):
        raise UserError(f"{where} has tool_calls {brief(calls)}; it should be a list")
    found = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise UserError(
                f'{where} has the tool call {brief(call)}; write {{"function": {{"name": ..., "arguments": ...}}}}'
            )
        inner = dict(inner)
        if isinstance(inner.get("arguments"), str):
            try:
                inner["arguments"] = json.loads(inner["arguments"])
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} has arguments of {inner['name']!r} that are not JSON: {error}") from error
        found.append({**call, "function": inner} if "function" in call else inner)
    return found


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
