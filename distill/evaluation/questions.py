"""Tasks as questions: what a line of a task's file asks, the table of tasks, and the numbers of a task from its answers.

All are in cloze form: the model reads the question and each choice as its continuation, never letters. The exception is
`mmlu_letters`, for teachers above 1B parameters: letters, the answers permuted by a seed, and a count of those chosen.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SEED = 20261125  # of the items drawn where a suite takes only some, and of permuted letters
LETTERS = "ABCD"
LETTERS_FROM = 10**9  # parameters below which letters are answered by chance


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
    return Question([(item["ctx"], f" {c}") for c in item["choices"]], item["label"], [len(c) for c in item["choices"]])


def partial(item: dict) -> Question:
    """The same target after each context (WinoGrande's partial evaluation, arXiv 1806.02847)."""
    pairs = [(context, f" {item['target']}") for context in item["contexts"]]
    return Question(pairs, item["label"], [len(item["target"])] * len(pairs))


def single(item: dict) -> Question:
    """One answer, right when greedy decoding says it."""
    return Question([(item["ctx"], f" {item['choices'][0]}")], 0, [len(item["choices"][0])])


def letters(item: dict) -> Question:
    """Choices as A to D in an order drawn by the question's text, and the letters as continuations."""
    digest = hashlib.sha256(item["ctx"].encode()).hexdigest()
    order = random.Random(f"{SEED} {digest}").sample(range(len(item["choices"])), len(item["choices"]))
    stem = item["ctx"].removesuffix("\nAnswer:")
    lines = [f"{letter}. {item['choices'][index]}" for letter, index in zip(LETTERS, order, strict=False)]
    context = "\n".join([stem, *lines, "Answer:"])
    return Question(
        [(context, f" {letter}") for letter in LETTERS[: len(order)]], order.index(item["label"]), [1] * len(order)
    )


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
