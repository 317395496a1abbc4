"""Tasks from local files, scored as lm-evaluation-harness scores them: by the log-likelihood of each choice.

Recovery is measured over six (WinoGrande, ARC easy and challenge, PIQA, HellaSwag, LAMBADA). `acc` takes the choice with the
highest log-likelihood, `acc_norm` the one with the highest log-likelihood divided by its length in characters.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from distill.evaluation.comparison import recovery, wins_and_ties
from distill.evaluation.evaluation import Evaluation
from distill.evaluation.questions import LETTERS, LETTERS_FROM, TASKS, Question, letters, summary
from distill.evaluation.rows import rows_table
from distill.evaluation.scoring import Answer, Marked, score, split
from distill.evaluation.suite import SIX, Suite
from distill.evaluation.task_files import find_file, read_questions
from distill.text.encoding import opened, opening
from distill.text.heldout import Heldout
from students.skeleton import Student
from teachers.teacher import Teacher

PART = 6  # tasks of a table in 80 columns


class Tasks(Evaluation):
    """The evaluation of tasks in cloze form, and the recovery of the teacher's scores."""

    suites = ("quick", "standard", "full")
    baselines = ("standard", "full")

    def measure(self, teacher: Teacher, model: Student | None, heldout: Heldout | None, suite: Suite) -> dict:
        found = row(teacher, model, heldout, suite)
        return {
            task: {**result, **({"in_sample": True} if task in suite.in_sample else {})} for task, result in found.items()
        }

    def divides(self, suite: Suite) -> bool:
        return suite.task_source != "harness"  # the harness may find its data on one machine only

    def beside(self, own: Any, teacher: Any) -> dict[str, Any]:
        pairs = {
            task: (own[task], teacher[task]) for task in own if "score" in own[task] and "score" in teacher.get(task, {})
        }
        return {
            "tasks": {task: wins_and_ties(one["correct"], other["correct"]) for task, (one, other) in pairs.items()},
            "recovery": recovery(
                {task: pair for task, pair in pairs.items() if task in SIX and not pair[0].get("in_sample")}
            ),
        }

    def chance(self, results: Any) -> dict[str, float]:
        return {task: found["chance"] for task, found in results.items() if "chance" in found}

    def left_out(self, results: Any) -> Iterator[tuple[str, str]]:
        for task, result in results.items():
            if "not_run" in result:
                yield task, result["not_run"]

    def tables(self, judged: Mapping) -> Iterator[tuple[str, Table]]:
        first = judged["rows"]["teacher"]["tasks"]
        scored = [task for task, result in first.items() if "score" in result]
        six, further = [task for task in scored if task in SIX], [task for task in scored if task not in SIX]
        if six:
            yield f"tasks, % ± standard error, {_items(first, six)}", _tasks_table(judged, six, recovery=True)
        for start in range(0, len(further), PART):
            part = further[start : start + PART]
            yield f"further tasks, % ± standard error, {_items(first, part)}", _tasks_table(judged, part, recovery=False)


def run_task(teacher: Teacher, model: nn.Module | None, name: str, questions: Sequence[Question]) -> dict:
    """Score one task. model: None scores the teacher.

    Returns:
        metric, score, error (its standard error), chance, items, acc, acc_norm (of choices), correct: one "0" or "1" an
        item by the metric; perplexity of single answers; letters, the number of times each was chosen (`mmlu_letters`).
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


def row(teacher: Teacher, model: Student | None, heldout: Heldout | None, suite: Suite) -> dict[str, dict]:
    """Score every task of the suite: {task: result}, or {"not_run": reason} for a task. model: None scores the teacher.

    Raises:
        UserError: a file's lines are not in their task's form.
    """
    if suite.task_source == "harness":
        from distill.evaluation.harness import run_tasks

        return run_tasks(teacher, model, suite.tasks, suite.items)
    return {name: _from_file(teacher, model, name, suite) for name in suite.tasks}


def _from_file(teacher: Teacher, model: Student | None, name: str, suite: Suite) -> dict:
    task, folder = TASKS[name], suite.task_source
    if folder is None:
        return {"not_run": "no task files: name their folder with --tasks or DISTILL_TASKS"}
    file = find_file(cast(Path, folder), task.file or name)
    if file is None:
        return {"not_run": f"no {task.file or name}.jsonl (.xz, .gz) in {folder}"}
    parameters = sum(tensor.numel() for tensor in teacher.model.parameters())
    if task.question is letters and parameters < LETTERS_FROM:
        return {
            "not_run": f"a teacher of {parameters / 1e6:.0f}M parameters answers letters at chance; mmlu_cloze asks the same"
        }
    questions = read_questions(name, file, suite.items)
    return run_task(teacher, model, name, questions)


def marked(teacher: Teacher, pairs: Sequence[tuple[str, str]]) -> list[Marked]:
    """Return the tokens of contexts and continuations, with the continuations as spans.

    A text beyond the teacher's positions is cut on the left. An empty context becomes the tokenizer's start token, or its
    end-of-text token if it has none.
    """
    tokenizer, limit = cast(PreTrainedTokenizerBase, teacher.tokenizer), teacher.positions()
    start, texts = opening(tokenizer), []
    alone = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for context, continuation in split(tokenizer, pairs):
        before = opened(context, start) or [alone]
        if limit:
            before = before[-max(1, limit + 1 - len(continuation)) :]
        texts.append(Marked(before + continuation, ((len(before), len(before) + len(continuation)),)))
    return texts


def _best(answers: Sequence[Answer], lengths: Sequence[int]) -> int:
    """Return the first choice with the highest log-likelihood a unit of length."""
    ratios = [answer.logprob / max(1, length) for answer, length in zip(answers, lengths, strict=True)]
    return ratios.index(max(ratios))


def _tasks_table(judged: Mapping, tasks: Sequence[str], recovery: bool) -> Table:
    lines = {}
    for row, results in judged["rows"].items():
        if "tasks" in results:
            cells = [results["tasks"][task] for task in tasks]
            lines[row] = [_score_cell(cell["score"], cell["error"]) for cell in cells]
            if recovery:
                found = judged["against_teacher"].get(row, {}).get("recovery", {"score": None})
                lines[row].append("" if found["score"] is None else _score_cell(found["score"], found["error"]))
    lines["chance"] = [f"{100 * judged['chance'][task]:.1f}" for task in tasks] + ([""] if recovery else [])
    beside = [judged["against_teacher"]["student"].get("tasks", {}).get(task) for task in tasks]
    lines["win or tie"] = ["" if one is None else f"{100 * one['win_or_tie']:.1f}" for one in beside]
    lines["win or tie"] += [""] if recovery else []
    selected = judged.get("in_sample", {}).get("tasks", [])
    names = [(TASKS[task].title or task) + " (in-sample)" * (task in selected) for task in tasks]
    return rows_table(["", *names, *(["recovery"] if recovery else [])], lines)


def _score_cell(value: float, error: float | None) -> str:
    places = 1 if error is None or error < 0.1 else 0
    return f"{100 * value:.1f}" + ("" if error is None else f"±{100 * error:.{places}f}")


def _items(results: Mapping, tasks: Sequence[str]) -> str:
    counts = sorted({results[task]["items"] for task in tasks})
    return f"{counts[0]} items each" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} items each"
