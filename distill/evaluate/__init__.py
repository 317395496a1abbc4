"""Judging students: two tables, EVALUATIONS here (what can be measured) and SUITES in suites.py (what is, and how much).

`distill eval` and `distill.evaluate` return, and write to a run folder's evaluations.json under "suites" by suite name:

    target, teacher     what was judged, and against whom
    suite               the suite's name; "run" for the table that ends a run ("final" in evaluations.json)
    device, precision   "cpu" or a GPU's name; "float32" or "bf16"
    pattern             one letter a layer
    rows                {row: {evaluation: result}}; rows as in rows.TITLES, in the order of the table, chance not among them
      fidelity          see fidelity.fidelity
      passkey           [{length, recalled, trials}]
      recall            {family: [{length, depth (needle alone), recalled, trials, score}]}
      tasks             {task: {metric, score, error, chance, items, correct, acc, acc_norm, perplexity, letters}}, the last
                        four where they apply; correct is "0110..." over the items; or {task: {not_run: reason}}
      speed             {device, method, cells: [{length, batch, prefill_seconds, first_token_seconds,
                        decode_tokens_per_second, peak_bytes, cache_bytes} or {length, batch, not_run}]}, on a GPU with
                        graph_decode_tokens_per_second or graph_not_run
    against_teacher     {row: {passkey, recall, tasks, recovery, speed}}, see compare.against_teacher
    chance              {task: score of guessing}; of recall it is 0
    layers              {layer: relative L2 error of the student's mixer}
    not_run             [{rows: [row ...], evaluation, part, reason}]: everything that the suite or the machine left out
    seconds             {row: {evaluation: seconds}}

To add an evaluation: a file beside this one with a function of (teacher, model or None for the teacher, held-out text,
suite), a line here, and its name in the suites that run it.
"""

import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from rich.console import Console
from torch import nn

from distill.callable_package import make_callable
from distill.evaluate.fidelity import Heldout
from distill.evaluate.suites import Suite
from teachers.teacher import Teacher

EVALUATIONS = {
    "fidelity": "distill.evaluate.fidelity:row",
    "passkey": "distill.evaluate.recall:passkey_row",
    "recall": "distill.evaluate.recall:row",
    "tasks": "distill.evaluate.tasks:row",
    "speed": "distill.evaluate.speed:row",
}
WHOLE = ("teacher", "student")  # the rows that get every evaluation of a suite; the others get its `baselines`

ModelMaker = Callable[[], nn.Module | None]


def judge_all(
    teacher: Teacher,
    rows: Mapping[str, ModelMaker],
    heldout: Heldout,
    suite: Suite,
    known: Mapping[str, Mapping],
    say: Callable[[str], None],
) -> tuple[dict[str, dict], dict[str, dict[str, float]]]:
    """Judge the models of several rows one after the other, each made when its turn comes.

    Args:
        known: by row and evaluation, results on this very text that need not be found again. say: told what comes next.

    Returns:
        results, and seconds taken, by row and evaluation.
    """
    results, seconds = {}, {}
    for row, make in rows.items():
        model, results[row], seconds[row] = make(), {}, {}
        for name in suite.evaluations if row in WHOLE else suite.baselines:
            module, _, function = EVALUATIONS[name].partition(":")
            say(f"{row}: {name}")
            began = time.monotonic()
            found = known.get(row, {}).get(name)
            results[row][name] = found or getattr(import_module(module), function)(teacher, model, heldout, suite)
            seconds[row][name] = round(time.monotonic() - began, 2)
    return results, seconds


def evaluate(
    target: str | Path,
    *,
    teacher: str | None = None,
    heldout: str | None = None,
    suite: str = "quick",
    tasks: str | Path | None = None,
    console: Console | None = None,
) -> dict:
    """Judge a run folder, or a student's folder or hub id, against its teacher and the untrained baselines.

    Args:
        teacher: the teacher's reference, where the target does not say or it moved. heldout: files of text (a glob)
            instead of the run's, or of the shipped held-out text for a checkpoint. suite: quick, standard or full.
        tasks: a folder of task files (see task_files.py), or "harness" for lm-evaluation-harness; DISTILL_TASKS by default.
        console: where what is being measured is shown.

    Returns:
        what this module's docstring says.

    Raises:
        UserError: the target is no student, the teacher is not its teacher, or there is no such suite or folder.
    """
    from distill.evaluate.target import evaluate_target

    return evaluate_target(target, teacher, heldout, suite, tasks, console)


make_callable(__name__)
