"""Tasks as questions: what a line of a task's file asks, the table of tasks, and the numbers of a task from its answers.

All are in cloze form: the model reads the question and each choice as its continuation, never letters. The exception is
`mmlu_letters`, for teachers above 1B parameters: letters, the answers permuted by a seed, and a count of those chosen.
"""

import hashlib
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distill.errors import brief

SEED = 20261125  # of the items drawn where a suite takes only some, and of permuted letters
LETTERS = "ABCD"
LETTERS_FROM = 10**9  # parameters below which letters are answered by chance


class FormError(ValueError):
    """A line that is not in its task's form; says what of it."""


@dataclass(frozen=True)
class Question:
    """Contexts and their continuations, of which one is right; a single pair asks whether greedy decoding says it."""

    pairs: list[tuple[str, str]]
    label: int
    lengths: list[int]  # of the choices, in characters


@dataclass(frozen=True)
class Task:
    """How a task's lines become questions.

    metric: what is reported first. file: whose lines, if not its own. title: in tables, where the name is too long. harness:
    its name in lm-evaluation-harness, if another. generated: whether the harness has the answer generated.
    """

    metric: str
    question: Callable[[dict], Question]
    file: str | None = None
    title: str | None = None
    harness: str | None = None
    generated: bool = False


def cloze(item: dict) -> Question:
    """The context, a space, and each choice."""
    context, choices = _text(item, "ctx"), _texts(item, "choices")
    return Question([(context, f" {choice}") for choice in choices], _label(item, choices), [len(c) for c in choices])


def partial(item: dict) -> Question:
    """The same target after each context (WinoGrande's partial evaluation, arXiv 1806.02847)."""
    contexts, target = _texts(item, "contexts"), _text(item, "target")
    return Question([(context, f" {target}") for context in contexts], _label(item, contexts), [len(target)] * len(contexts))


def single(item: dict) -> Question:
    """One answer, right when greedy decoding says it; the first one, unless a label names another."""
    answers = _texts(item, "choices", least=1)
    answer = answers[_label(item, answers) if "label" in item else 0]
    return Question([(_text(item, "ctx"), f" {answer}")], 0, [len(answer)])


def letters(item: dict) -> Question:
    """Choices as A to D in an order drawn by the question's text, and the letters as continuations."""
    context, choices = _text(item, "ctx"), _texts(item, "choices")
    if len(choices) > len(LETTERS):
        raise FormError(f"there are {len(choices)} choices, but letters for {len(LETTERS)}")
    digest = hashlib.sha256(context.encode()).hexdigest()
    order = random.Random(f"{SEED} {digest}").sample(range(len(choices)), len(choices))
    lines = [f"{letter}. {choices[index]}" for letter, index in zip(LETTERS, order, strict=False)]
    context = "\n".join([context.removesuffix("\nAnswer:"), *lines, "Answer:"])
    pairs = [(context, f" {letter}") for letter in LETTERS[: len(order)]]
    return Question(pairs, order.index(_label(item, choices)), [1] * len(order))


def _text(item: dict, key: str) -> str:
    if not isinstance(item[key], str):
        raise FormError(f"{key} is {brief(item[key])}, which is no text")
    return _whole(item[key], key)


def _texts(item: dict, key: str, least: int = 2) -> list[str]:
    found = item[key]
    if not isinstance(found, list) or len(found) < least or not all(isinstance(text, str) for text in found):
        raise FormError(f"{key} is {brief(found)}, which is no list of {least} or more texts")
    return [_whole(text, key) for text in found]


def _whole(text: str, key: str) -> str:
    """A text that UTF-8 has bytes for: JSON may write half of a character."""
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        raise FormError(f"{key} is {brief(text)}, which holds half of a character")
    return text


def _label(item: dict, choices: Sequence) -> int:
    """The index of the right choice; numbers as text are taken. Anything else would be a wrong answer for every model."""
    label, last = item["label"], len(choices) - 1
    index = int(label) if isinstance(label, str) and re.fullmatch("[0-9]{1,9}", label) else label
    if isinstance(index, bool) or not isinstance(index, int):
        raise FormError(
            f"label is {brief(label)}; it must be the index of the right choice, 0 to {last}, not a letter or a text"
        )
    if not 0 <= index <= last:
        hint = "; labels count from 0" if index == last + 1 else ""
        raise FormError(f"label is {brief(label)}, but the indexes of its {len(choices)} choices are 0 to {last}{hint}")
    return index


TASKS = {
    "winogrande": Task("acc", partial, title="WinoGr."),
    "arc_easy": Task("acc", cloze, title="ARC-E"),
    "arc_challenge": Task("acc_norm", cloze, title="ARC-C"),
    "piqa": Task("acc", cloze, title="PIQA"),
    "hellaswag": Task("acc_norm", cloze, title="HellaSw."),
    "lambada": Task("acc", single, title="LAMBADA", harness="lambada_openai"),
    "openbookqa": Task("acc_norm", cloze),
    "boolq": Task("acc", cloze),
    "mmlu_cloze": Task("acc", cloze, harness="mmlu_continuation"),
    "mmlu_letters": Task("acc", letters, file="mmlu_cloze"),
    "swde": Task("acc", single, generated=True),
    "fda": Task("acc", single, generated=True),
    "squad": Task("acc", single, generated=True, harness="squad_completion"),
}


def summary(metric: str, correct: Sequence[bool], chance: float) -> dict:
    """The numbers of a task from what is right, item by item; the standard error is that of a mean of so many items."""
    count, mean = len(correct), sum(correct) / len(correct)
    error = math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else None
    string = "".join("1" if one else "0" for one in correct)
    return {"metric": metric, "score": mean, "error": error, "chance": chance, "items": count, "correct": string}
