"""The judging of every row of a table, one model after the other, and its comparison with the teacher."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from distill.division import dividing, first_decides
from distill.evaluation.evaluation import Evaluation
from distill.evaluation.nonfinite import NotFinite
from distill.evaluation.pairing import paired
from distill.evaluation.rows import KNOCKOUTS, TITLES, rows_left_out, rows_of
from distill.evaluation.suite import Suite
from distill.evaluation.suites import EVALUATIONS, evaluation, suite_of_run
from distill.loading import load_student
from distill.runs.session import Session
from distill.stages.probe import judged_layer_errors, probe
from distill.text.heldout import Heldout
from students.skeleton import Student
from teachers.teacher import Teacher

WHOLE = ("teacher", "student")  # the rows that get every evaluation of a suite; the others get its `baselines`

ModelMaker = Callable[[], Student | None]


def judge_session(
    session: Session,
    student: Student,
    twin: Path | None,
    suite: Suite | None = None,
    known: Mapping[str, Mapping] | None = None,
    say: Callable[[str], None] = lambda what: None,
    overlaps: bool = True,
) -> dict:
    """Judge every row, compare it with the teacher, and measure the student's error in each converted layer.

    Every process of a run calls this with the same student, and gets the result that a single process would get.

    Args:
        suite: what to measure; None for the suite that ends a run. known, say: as in `judge_all`.
        overlaps: whether the session's training text is what the student was trained on.
    """
    recipe, teacher = session.recipe, session.teacher
    selected = recipe.selected.model_dump(exclude={"by"}) if recipe.selected else {}
    suite = replace(suite or suite_of_run(recipe.evaluation), in_sample=tuple(selected.get("tasks", ())))
    suite, too_long = suite.within(teacher.positions(student.layout.meta_tokens))

    def load_twin() -> Student:
        loaded: Any = load_student(cast(Path, twin))
        return loaded.to(teacher.device)

    rows = rows_of(teacher, lambda: student, student.layout, load_twin if twin else None)
    with torch.no_grad(), dividing(), session.accelerator.autocast():
        heldout = session.heldout(*suite.text(recipe.evaluation, session.heldout_windows.seq_len))
        results, seconds, dropped = judge_all(teacher, rows, heldout, suite, known or {}, say)
        probed = probe(teacher, student, session.probe_batch())
    precision, device = session.accelerator.mixed_precision, teacher.device
    return {
        "teacher": teacher.reference,
        "suite": suite.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": {"no": "float32"}.get(precision, precision),
        "pattern": student.layout.pattern,
        "rows": results,
        "against_teacher": against_teacher(results),
        "against_student": against_student(results),
        "chance": chances(results["teacher"]),
        "in_sample": selected,
        "layers": judged_layer_errors(probed),
        "overlap": session.overlap if overlaps else None,
        "not_run": too_long + rows_left_out(student, twin is not None) + dropped + not_run(results, suite),
        "seconds": seconds,
    }


def judge_all(
    teacher: Teacher,
    rows: Mapping[str, ModelMaker],
    heldout: Heldout,
    suite: Suite,
    known: Mapping[str, Mapping],
    say: Callable[[str], None],
) -> tuple[dict[str, dict], dict[str, dict[str, float]], list[dict]]:
    """Judge the models of several rows one after the other. Only one is in memory at a time.

    Args:
        known: by row and evaluation, results on the same text that are taken over. say: called with what is measured next.

    Returns:
        results, and seconds taken, by row and evaluation; and the rows that are left out because their outputs are not
        finite, with the layer where that began.

    Raises:
        NotFinite: the teacher's outputs or the student's are not finite.
    """
    results, seconds, dropped = {}, {}, []
    for row, make in rows.items():
        model, found, taken = make(), {}, {}
        try:
            for name in evaluations_of(row, suite):
                say(f"{row}: {name}")
                began = time.monotonic()
                found[name] = known.get(row, {}).get(name) or _measured(evaluation(name), teacher, model, heldout, suite)
                taken[name] = round(time.monotonic() - began, 2)
        except NotFinite as error:
            if row in WHOLE:
                raise NotFinite(f"{TITLES[row]}, {name}: {error}; there is nothing to compare") from error
            dropped.append({"rows": [row], "evaluation": "every", "part": "", "reason": f"{name}: {error}"})
            continue
        results[row], seconds[row] = found, taken
    return results, seconds, dropped


def _measured(this: Evaluation, teacher: Teacher, model: Student | None, heldout: Heldout, suite: Suite) -> Any:
    """Return one model's results. An evaluation that cannot be divided is measured by the first process alone."""
    if this.divides(suite):
        return this.measure(teacher, model, heldout, suite)
    return first_decides(lambda: this.measure(teacher, model, heldout, suite))


def evaluations_of(row: str, suite: Suite) -> tuple[str, ...]:
    """Return the evaluations that a suite runs for a row."""
    if row in WHOLE:
        return suite.evaluations
    return suite.knockouts if row in KNOCKOUTS else suite.baselines


def chances(teacher: Mapping) -> dict[str, float]:
    """Return the scores of guessing, in everything that the teacher was scored in."""
    found = [evaluation(name).chance(results) for name, results in teacher.items()]
    return {what: score for scores in found for what, score in scores.items()}


def against_teacher(rows: Mapping[str, Mapping]) -> dict[str, dict]:
    """Compare the results of each row with the teacher's.

    Returns:
        {row: {"passkey": [{length, share}], "recall": {family: [{length, depth, share}]}, "tasks": {task: ...}, "recovery":
        ..., "speed": [{batch, first_token, decode}]}}, with each key if both have results; see each evaluation's `beside`.
    """
    teacher, compared = rows["teacher"], {}
    for row, results in rows.items():
        if row != "teacher":
            both = [name for name in EVALUATIONS if name in results and name in teacher]
            found = [evaluation(name).beside(results[name], teacher[name]) for name in both]
            compared[row] = {key: value for entries in found for key, value in entries.items()}
    return compared


def against_student(rows: Mapping[str, Mapping]) -> dict[str, dict]:
    """Return, for each other row, the student's fidelity less the row's on the same documents, see `paired`."""
    found = {row: results["fidelity"] for row, results in rows.items() if "fidelity" in results}
    return {row: paired(found["student"], other) for row, other in found.items() if row != "student" in found}


def not_run(results: Mapping[str, Mapping], suite: Suite) -> list[dict]:
    """Return the parts of a suite without a result, each reason once with its rows."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row, evaluations in results.items():
        for name in suite.evaluations:
            if name not in evaluations and row not in WHOLE:
                found.setdefault((name, "", f"the {suite.name} suite leaves it out for this row"), []).append(row)
        for name, measured in evaluations.items():
            for part, reason in evaluation(name).left_out(measured):
                found.setdefault((name, part, reason), []).append(row)
    return [
        {"rows": rows, "evaluation": name, "part": part, "reason": reason} for (name, part, reason), rows in found.items()
    ]
