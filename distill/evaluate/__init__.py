"""Judging students. The table of evaluations: each takes (teacher, model or None for the teacher, held-out text, options).

To add one: a file beside this one and a line here; its result appears under its name in every row.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from torch import nn

from distill.callable_package import make_callable
from distill.evaluate.fidelity import Heldout
from distill.recipe import Evaluation
from teachers.teacher import Teacher

EVALUATIONS = {
    "fidelity": "distill.evaluate.fidelity:row",
    "passkey": "distill.evaluate.recall:row",
}

ModelMaker = Callable[[], nn.Module | None]


def judge(teacher: Teacher, model: nn.Module | None, heldout: Heldout, options: Evaluation, known: Mapping) -> dict:
    """Every evaluation of one model, but for results already known; `model` None judges the teacher itself."""
    results = {}
    for name, target in EVALUATIONS.items():
        module, _, function = target.partition(":")
        results[name] = known.get(name) or getattr(import_module(module), function)(teacher, model, heldout, options)
    return results


def judge_all(
    teacher: Teacher, rows: Mapping[str, ModelMaker], heldout: Heldout, options: Evaluation, known: Mapping[str, Mapping]
) -> dict[str, dict]:
    """Judge the models of several rows one after the other, each made when its turn comes.

    Args:
        known: by row and evaluation, results on this very text that need not be found again.
    """
    return {name: judge(teacher, make(), heldout, options, known.get(name, {})) for name, make in rows.items()}


def evaluate(target: str | Path, *, teacher: str | None = None, heldout: str | None = None) -> dict:
    """Judge a run folder, or a student's folder or hub id, against its teacher and the untrained baselines.

    Args:
        teacher: the teacher's reference, where the target does not say or it moved. heldout: files of text (a glob)
            instead of the run's, or of the shipped held-out text for a checkpoint.

    Returns:
        {"target", "teacher", "pattern": one letter a layer, "rows": {row: {evaluation: result}},
        "layers": {layer: relative L2 error}}.

    Raises:
        UserError: the target is no student, or the teacher is not its teacher.
    """
    from distill.evaluate.target import evaluate_target

    return evaluate_target(target, teacher, heldout)


make_callable(__name__)
