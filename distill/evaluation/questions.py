"""Tasks as questions: the table of tasks, the question in each line of a task's file, and a task's score from its answers.

All are in cloze form: the model reads the question with each choice as its continuation, and never letters. The exception is
`mmlu_letters`, for teachers above 1B parameters: it has letters in an order drawn by a seed, and counts the letters chosen.
"""

import hashlib
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distill.errors import brief

SEED = 20261125  # for drawing items if a suite takes only some, and for permuting letters
LETTERS = "ABCD"
LETTERS_FROM = 10**9  # parameters; smaller teachers answer letters at chance


class FormError(ValueError):
    """A line is not in its task's form; the message names the fault."""


@dataclass(frozen=True)
class Question:
    """Contexts and their continuations, one of which is right. A single pair is right if greedy decoding generates it."""

    pairs: list[tuple[str, str]]
    label: int
    lengths: list[int]  # of the choices, in characters


@dataclass(frozen=True)
class Task:
    """A task of the table.

    metric: the metric that is reported first. question: makes a question from a line of the file. file: the task whose file
    is read, if not its own. title: its name in tables, if its own is too long. harness: its name in lm-evaluation-harness,
    if another. generated: whether the harness lets the model generate the answer.
    """

    metric: str
    question: Callable[[dict], Question]
    file: str | None = None
    title: str | None = None
    harness: str | None = None
    generated: bool = False


def cloze(item: dict) -> Question:
    """Make a question of a context, a space, and each choice."""
    context, choices = _text(item, "ctx"), _texts(item, "choices")
    return Question([(context, f" {choice}") for choice in choices], _label(item, choices), [len(c) for c in choices])


def partial(item: dict) -> Question:
    """Make a question of the same target after each context (WinoGrande's partial evaluation, arXiv 1806.02847)."""
    contexts, target = _texts(item, "contexts"), _text(item, "target")
    return Question([(context, f" {target}") for context in contexts], _label(item, contexts), [len(target)] * len(contexts))


def single(item: dict) -> Question:
    """Make a question of one answer, right if greedy decoding generates it: the first choice, or the one of a label."""
    answers = _texts(item, "choices", least=1)
    answer = answers[_label(item, answers) if "label" in item else 0]
    return Question([(_text(item, "ctx"), f" {answer}")], 0, [len(answer)])


def letters(item: dict) -> Question:
    """Make a question of choices named A to D, in an order drawn by the question's text, with letters as continuations."""
    context, choices = _text(item, "ctx"), _texts(item, "choices")
    if len(choices) > len(LETTERS):
        raise FormError(f"there are {len(choices)} choices, but letters only for {len(LETTERS)}")
    digest = hashlib.sha256(context.encode()).hexdigest()
    order = random.Random(f"{SEED} {digest}").sample(range(len(choices)), len(choices))
    lines = [f"{letter}. {choices[index]}" for letter, index in zip(LETTERS, order, strict=False)]
    context = "\n".join([context.removesuffix("\nAnswer:"), *lines, "Answer:"])
    pairs = [(context, f" {letter}") for letter in LETTERS[: len(order)]]
    return Question(pairs, order.index(_label(item, choices)), [1] * len(order))


def _text(item: dict, key: str) -> str:
    if not isinstance(item[key], str):
        raise FormError(f"{key} is {brief(item[key])}, which is not a text")
    return _whole(item[key], key)


def _texts(item: dict, key: str, least: int = 2) -> list[str]:
    found = item[key]
    if not isinstance(found, list) or len(found) < least or not all(isinstance(text, str) for text in found):
        raise FormError(f"{key} is {brief(found)}, which is not a list of {least} or more texts")
    return [_whole(text, key) for text in found]


def _whole(text: str, key: str) -> str:
    """Return a text that UTF-8 can encode, and refuse others: JSON may hold half of a character."""
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        raise FormError(f"{key} is {brief(text)}, which holds half of a character")
    return text


def _label(item: dict, choices: Sequence) -> int:
    """Return the index of the right choice, also from text. Anything else would be a wrong answer for every model."""
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
    """Return a task's score, with the standard error of a mean over its items, from which items are right."""
    count, mean = len(correct), sum(correct) / len(correct)
    error = math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else None
    string = "".join("1" if one else "0" for one in correct)
    return {"metric": metric, "score": mean, "error": error, "chance": chance, "items": count, "correct": string}
