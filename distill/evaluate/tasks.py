"""Tasks from local files, scored as lm-evaluation-harness scores them: by the log-likelihood of each choice.

The six that recovery is measured over (WinoGrande, ARC easy and challenge, PIQA, HellaSwag, LAMBADA) and further ones, all
in cloze form: the model reads the question and each choice as its continuation, never letters. `acc` takes the choice of the
highest log-likelihood, `acc_norm` that divided by the choice's length in characters. The exception is `mmlu_letters`, for
teachers above 1B parameters: letters, the answers permuted by a seed, with a count of the letters chosen.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from distill.errors import UserError
from distill.evaluate.scoring import Answer, Marked, opening, score, split
from distill.evaluate.suites import Suite
from distill.evaluate.task_files import SEED, find_file, read_items
from teachers.teacher import Teacher

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
    """How a task's lines become questions. metric: what is reported first. file: whose lines, if not its own."""

    metric: str
    question: Callable[[dict], Question]
    file: str | None = None


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
    "winogrande": Task("acc", partial),
    "arc_easy": Task("acc", cloze),
    "arc_challenge": Task("acc_norm", cloze),
    "piqa": Task("acc", cloze),
    "hellaswag": Task("acc_norm", cloze),
    "lambada": Task("acc", single),
    "openbookqa": Task("acc_norm", cloze),
    "boolq": Task("acc", cloze),
    "mmlu_cloze": Task("acc", cloze),
    "mmlu_letters": Task("acc", letters, file="mmlu_cloze"),
    "swde": Task("acc", single),
    "fda": Task("acc", single),
    "squad": Task("acc", single),
}


def run_task(teacher: Teacher, model: nn.Module | None, name: str, questions: Sequence[Question]) -> dict:
    """Score one task; `model` None asks the teacher.

    Returns:
        metric, score, error (its standard error), chance, items, acc, acc_norm (of choices), correct: one "0" or "1" an
        item by the metric; perplexity of single answers; letters chosen, of `mmlu_letters`.
    """
    texts = marked(teacher, [pair for question in questions for pair in question.pairs])
    answers = iter([found for (found,) in score(teacher, model, texts)])
    per_question = [[next(answers) for _ in question.pairs] for question in questions]
    metric = TASKS[name].metric
    if all(len(question.pairs) == 1 for question in questions):
        correct = [found[0].greedy for found in per_question]
        mean = sum(found[0].logprob for found in per_question) / len(questions)
        return {**summary(metric, correct, chance=0.0), "perplexity": math.exp(min(-mean, 700.0))}
    picks = {
        "acc": [_best(found, [1] * len(found)) for found in per_question],
        "acc_norm": [_best(found, q.lengths) for found, q in zip(per_question, questions, strict=True)],
    }
    right = {
        kind: [pick == question.label for pick, question in zip(chosen, questions, strict=True)]
        for kind, chosen in picks.items()
    }
    chance = sum(1 / len(question.pairs) for question in questions) / len(questions)
    result = summary(metric, right[metric], chance) | {kind: sum(said) / len(said) for kind, said in right.items()}
    if TASKS[name].question is letters:
        result["letters"] = {letter: picks["acc"].count(index) for index, letter in enumerate(LETTERS)}
    return result


def summary(metric: str, correct: Sequence[bool], chance: float) -> dict:
    """The numbers of a task from what is right, item by item; the standard error is that of a mean of so many items."""
    count, mean = len(correct), sum(correct) / len(correct)
    error = math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else None
    string = "".join("1" if one else "0" for one in correct)
    return {"metric": metric, "score": mean, "error": error, "chance": chance, "items": count, "correct": string}


def row(teacher: Teacher, model: nn.Module | None, heldout, suite: Suite) -> dict[str, dict]:
    """Every task of the suite as the table of evaluations calls it: {task: result}, or {"not_run": reason} of a task.

    Raises:
        UserError: a file's lines are not in their task's form.
    """
    if suite.task_source == "harness":
        from distill.evaluate.harness import run_tasks

        return run_tasks(teacher, model, suite.tasks, suite.items)
    return {name: _from_file(teacher, model, name, suite) for name in suite.tasks}


def _from_file(teacher: Teacher, model: nn.Module | None, name: str, suite: Suite) -> dict:
    task, folder = TASKS[name], suite.task_source
    if folder is None:
        return {"not_run": "no task files: name their folder with --tasks or DISTILL_TASKS"}
    file = find_file(folder, task.file or name)
    if file is None:
        return {"not_run": f"no {task.file or name}.jsonl (.xz, .gz) in {folder}"}
    parameters = sum(tensor.numel() for tensor in teacher.model.parameters())
    if task.question is letters and parameters < LETTERS_FROM:
        return {
            "not_run": f"a teacher of {parameters / 1e6:.0f}M parameters answers letters by chance; mmlu_cloze asks the same"
        }
    questions = read_questions(name, file, suite.items)
    return run_task(teacher, model, name, questions)


def read_questions(name: str, file: Path, items: int | None) -> list[Question]:
    """A task's questions, or so many of them, always the same ones.

    Raises:
        UserError: the file is damaged, or its lines are not in the task's form.
    """
    questions = []
    for number, item in enumerate(read_items(file, items), 1):
        try:
            questions.append(TASKS[name].question(item))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise UserError(
                f"{file}, item {number}, is not in the form of {name}: {type(error).__name__} {error}; "
                "see distill/evaluate/task_files.py"
            ) from error
    return questions


def marked(teacher: Teacher, pairs: Sequence[tuple[str, str]]) -> list[Marked]:
    """The tokens of contexts and continuations, the latter as spans.

    Cut on the left where the teacher has no positions for all; an empty context is the token that the tokenizer opens
    with, or the end of a text where it opens with none.
    """
    tokenizer, limit = teacher.tokenizer, getattr(teacher.config, "max_position_embeddings", None)
    start, texts = opening(tokenizer), []
    alone = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for context, continuation in split(tokenizer, pairs):
        before = start + context or [alone]
        if limit:
            before = before[-max(1, limit + 1 - len(continuation)) :]
        texts.append(Marked(before + continuation, ((len(before), len(before) + len(continuation)),)))
    return texts


def _best(answers: Sequence[Answer], lengths: Sequence[int]) -> int:
    """The first choice of the highest log-likelihood a unit of length."""
    ratios = [answer.logprob / max(1, length) for answer, length in zip(answers, lengths, strict=True)]
    return ratios.index(max(ratios))
