"""`distill eval`: a run folder or a student is judged against its teacher, on held-out text and tasks."""

import dataclasses
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from rich.console import Console

from distill.errors import UserError
from distill.evaluation.identity import check_identity
from distill.evaluation.judging import judge_session
from distill.evaluation.suite import Suite
from distill.evaluation.suites import find_suite
from distill.evaluation.task_files import check_folder
from distill.loading import check_teacher, load_student, made_of
from distill.memory import enough_memory
from distill.recipe import Data, Recipe, Selected, TextSource
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from distill.schema import explain

SHIPPED_HELDOUT = TextSource(path="shipped:heldout.jsonl.xz")


def judge_target(
    target: str | Path,
    teacher: str | None,
    heldout: str | None,
    suite: str,
    tasks: str | Path | None,
    console: Console | None,
) -> tuple[dict, RunDir | None]:
    """Judge a run folder or a student; see `distill.evaluate`.

    Returns:
        the judgement, and the run folder if the target is one.
    """
    chosen = dataclasses.replace(find_suite(suite), task_source=task_source(tasks))
    on_cpu = ", or judge it on a CPU: CUDA_VISIBLE_DEVICES= before the command" if torch.cuda.is_available() else ""
    with enough_memory(f"judging {target}", f"--suite (now {suite}, and quick is the least){on_cpu}"):
        folder = RunDir.existing(target) if os.path.isfile(Path(target) / "recipe.yaml") else None
        return _judge(target, folder, teacher, heldout, chosen, console or Console(quiet=True)), folder


def task_source(tasks: str | Path | None) -> Path | str | None:
    """Return the source of tasks: a folder of files, "harness", or None.

    Raises:
        UserError: the folder does not exist, or lm-evaluation-harness is not installed.
    """
    given = tasks or os.environ.get("DISTILL_TASKS")
    if not given:
        return None
    if str(given) != "harness":
        return check_folder(given)
    if find_spec("lm_eval") is None:
        raise UserError(
            "--tasks is harness, but lm-evaluation-harness is not installed: pip install 'distill-hybrids[eval]'"
        )
    return "harness"


def _judge(
    target: str | Path, folder: RunDir | None, teacher: str | None, heldout: str | None, suite: Suite, console: Console
) -> dict:
    student_path = folder.student if folder else target
    if folder and not folder.student.exists():
        raise UserError(f"{folder.path} has no finished student yet; {folder.why_unfinished}")
    student, written = load_student(student_path), _written(student_path)
    recipe = _laid_out(folder) if folder else _recipe_for(student, student_path, teacher)
    changes: dict[str, Any] = {"teacher": teacher} if teacher else {}
    if heldout:
        changes["data"] = recipe.data.model_copy(update={"heldout": [TextSource(path=heldout)]})
    session = Session.open(recipe.model_copy(update=changes), trains=False)
    student = cast(Any, student).to(session.teacher.device)
    check_teacher(student, session.teacher, student_path)
    identity = check_identity(session.teacher, student.layout)
    twin = folder.path / "twin" / "student" if folder else None
    with console.status("") as status:

        def say(what: str) -> None:
            status.update(what)
            if not console.is_terminal:
                console.print(f"  {what}")

        twin = twin if twin and twin.exists() else None
        judged = judge_session(session, student, twin, suite, say=say, overlaps=folder is not None)
    if folder and not heldout and judged.get("overlap") is None:  # the training text is gone, but the run compared it
        judged["overlap"] = (folder.read("evaluations.json", {}).get("final") or {}).get("overlap")
    if folder and _written(student_path) != written:
        raise UserError(
            f"{student_path} was replaced while it was judged, so these are another student's results; judge again"
        )
    return {"target": str(target), "identity": identity, **judged}


def _written(student: str | Path) -> tuple[int, int] | None:
    """Return what identifies a student's folder, so that a replaced one is noticed; None if it is not on this machine."""
    try:
        found = os.stat(student)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _laid_out(folder: RunDir) -> Recipe:
    """Return a run's recipe with its layout.

    If an earlier version did not record what selected the layout, everything that it may have read counts.
    """
    recipe, chosen = folder.laid_out(), folder.read("selection.json", {}).get("chosen")
    if recipe.selected is not None or chosen is None:
        return recipe
    options = chosen.get("options", {})
    selected = Selected(by=chosen["by"], families=options.get("families", []), tasks=options.get("names", []))
    return recipe.model_copy(update={"selected": selected})


def _recipe_for(student, path: str | Path, teacher: str | None) -> Recipe:
    """Return the recipe with which a student outside a run folder is judged."""
    made = made_of(student, path)
    reference = teacher or made.teacher.reference
    if reference is None:
        raise UserError(f"{path} does not say which teacher it was distilled from; pass it with --teacher")
    data = Data(train=[SHIPPED_HELDOUT], heldout=[SHIPPED_HELDOUT], seq_len=512, batch=1)
    layout = student.layout
    entries = {"name": "eval", "teacher": reference, "pattern": layout.pattern, "mixers": layout.mixers, "stages": []}
    try:
        return Recipe(**entries, selected=made.selected, data=data)
    except ValidationError as error:
        raise UserError(explain(error, str(path), Recipe)) from error
