"""The rows that are written for answers: a chat that ends with the answer, or a pair of the reference and a wrong answer."""

from collections.abc import Sequence
from typing import Any, cast

from distill.answering.final_answers import final_answer, same
from distill.answering.prompts import Prompt
from distill.answering.speaking import Said
from distill.text.chats import ASSISTANT, COMPLETION, MESSAGES, PROMPT

CHOSEN, REJECTED = "chosen", "rejected"
# The outcomes of a prompt, with their words in the summary.
ANSWERS = {"answered": "answered", "unfinished": "not finished within --tokens", "empty": "empty"}
PAIRS = {
    "pairs": "answered wrongly: pairs",
    "right": "answered rightly",
    "unstated": "without a final answer",
    "no_reference": "whose reference states no final answer",
    "unfinished": "not finished within --tokens",
    "empty": "empty",
}


def outcome(prompt: Prompt, said: Said, pairs: bool) -> str:
    """The outcome of a prompt, a key of ANSWERS or PAIRS."""
    if pairs and (prompt.reference is None or final_answer(prompt.reference) is None):
        return "no_reference"
    if not said.finished:
        return "unfinished"
    if not said.text.strip():
        return "empty"
    return _marked(prompt, said.text) if pairs else "answered"


def _marked(prompt: Prompt, text: str) -> str:
    """The outcome of an answer, by comparing its final answer with the reference's."""
    ours = final_answer(text)
    if ours is None:
        return "unstated"
    question = "\n".join(message["content"] for message in prompt.messages)
    return "right" if same(ours, cast(str, final_answer(cast(str, prompt.reference))), question) else "pairs"


def row_of(prompt: Prompt, said: Said, pairs: bool) -> dict[str, Any]:
    """The row of an answer. After earlier turns of the assistant it is a prompt with a completion, so that only the new turn
    is trained on."""
    turn = [{"role": ASSISTANT, "content": said.text}]
    if pairs:
        right = [{"role": ASSISTANT, "content": prompt.reference}]
        return {PROMPT: prompt.messages, CHOSEN: right, REJECTED: turn} | prompt.beside()
    if any(message["role"] == ASSISTANT for message in prompt.messages):
        row: dict[str, Any] = {PROMPT: prompt.messages, COMPLETION: turn}
    else:
        row = {MESSAGES: prompt.messages + turn}
    return row | prompt.beside() | {"finished": said.finished}


def rows_of(
    prompts: Sequence[Prompt], answers: Sequence[Said], pairs: bool, unfinished: bool
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows of a shard, and its counts.

    Args:
        unfinished: whether answers that were cut off are written too, with `finished: false`.
    """
    rows, counts = [], dict.fromkeys([*(PAIRS if pairs else ANSWERS), "tokens"], 0)
    for prompt, said in zip(prompts, answers, strict=True):
        what = outcome(prompt, said, pairs)
        counts[what] += 1
        counts["tokens"] += said.tokens
        cut = unfinished and not pairs and what == "unfinished" and said.text.strip()
        if what == ("pairs" if pairs else "answered") or cut:
            rows.append(row_of(prompt, said, pairs))
    return rows, counts
