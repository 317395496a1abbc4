"""`distill eval`: what its target is, and whether the teacher is the right one."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

import students
import teachers
from distill.errors import UserError
from distill.evaluate import WHOLE, judge_all
from distill.evaluate.compare import against_teacher
from distill.evaluate.rows import rows_left_out, rows_of
from distill.evaluate.suites import Suite, find_suite, suite_of_run
from distill.evaluate.task_files import check_folder
from distill.memory import enough_memory, ran_out
from distill.probe import probe
from distill.recipe import Data, Recipe, Text
from distill.report import write_report
from distill.run_dir import RunDir
from distill.session import Session

SHIPPED_HELDOUT = Text(path="shipped:heldout.jsonl.xz")


def evaluate_target(
    target: str | Path,
    teacher: str | None,
    heldout: str | None,
    suite: str,
    tasks: str | Path | None,
    console: Console | None,
) -> dict:
    """See `distill.evaluate.evaluate`."""
    chosen = dataclasses.replace(find_suite(suite), task_source=task_source(tasks))
    with enough_memory(f"judging {target}", "evaluation.tokens or evaluation.seq_len in its recipe, or judge it on a CPU"):
        return _evaluate(target, teacher, heldout, chosen, console or Console(quiet=True))


def task_source(tasks: str | Path | None) -> Path | str | None:
    """Where tasks come from: a folder of files, "harness", or nowhere.

    Raises:
        UserError: there is no such folder, or lm-evaluation-harness is not installed.
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


def _evaluate(target: str | Path, teacher: str | None, heldout: str | None, suite: Suite, console: Console) -> dict:
    folder = RunDir.existing(target) if (Path(target) / "recipe.yaml").is_file() else None
    student_path = folder.student if folder else target
    if folder and not student_path.exists():
        raise UserError(f"{folder.path} has no finished student yet; the same `distill run` goes on with it")
    student = load_student(student_path)
    recipe = folder.recipe() if folder else _recipe_for(student, student_path, teacher)
    changes = {"teacher": teacher} if teacher else {}
    if heldout:
        changes["data"] = recipe.data.model_copy(update={"heldout": [Text(path=heldout)]})
    session = Session.open(recipe.model_copy(update=changes), trains=False)
    student = student.to(session.teacher.device)
    check_teacher(student, session.teacher, student_path)
    twin = folder.path / "twin" / "student" if folder else None
    suite, too_long = suite.within(getattr(session.teacher.config, "max_position_embeddings", None))
    with console.status("") as status:

        def say(what: str) -> None:
            status.update(what)
            if not console.is_terminal:
                console.print(f"  {what}")

        judged = judge_session(session, student, twin if twin and twin.exists() else None, suite, say=say)
    judged = {"target": str(target), **judged, "not_run": too_long + judged["not_run"]}
    if folder:
        suites = folder.read("evaluations.json", {}).get("suites", {})
        try:
            folder.update("evaluations.json", suites={**suites, suite.name: judged})
            write_report(folder)
        except UserError as error:  # a run of somebody else's can be judged all the same
            console.print(f"  these results are not kept in the run folder: {error}")
    return judged


def judge_session(
    session: Session,
    student,
    twin: Path | None,
    suite: Suite | None = None,
    known: Mapping[str, Mapping] | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> dict:
    """Every row's results, what they are beside the teacher's, and the student's error in each converted layer.

    Args:
        suite: what to measure; None for what ends a run. known, say: as in `judge_all`.
    """
    options, teacher = session.recipe.evaluation, session.teacher
    suite = suite or suite_of_run(options)

    def load_twin():
        return load_student(twin).to(teacher.device)

    rows = rows_of(teacher, lambda: student, student.layout, load_twin if twin else None)
    with torch.no_grad(), session.accelerator.autocast():
        heldout = session.heldout(suite.tokens(options))
        results, seconds = judge_all(teacher, rows, heldout, suite, known or {}, say)
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
        "chance": {
            task: found["chance"] for task, found in results["teacher"].get("tasks", {}).items() if "chance" in found
        },
        "layers": {name.split("/")[1]: value**0.5 for name, value in probed.items() if name.startswith("align/")},
        "not_run": rows_left_out(student.layout, twin is not None) + not_run(results, suite),
        "seconds": seconds,
    }


def not_run(results: Mapping[str, Mapping], suite: Suite) -> list[dict]:
    """What of a suite has no result, each reason once with its rows."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row, evaluations in results.items():
        for name in suite.evaluations:
            if name not in evaluations and row not in WHOLE:
                found.setdefault((name, "", f"the {suite.name} suite leaves it out for baselines"), []).append(row)
        for task, result in evaluations.get("tasks", {}).items():
            if "not_run" in result:
                found.setdefault(("tasks", task, result["not_run"]), []).append(row)
        for cell in evaluations.get("speed", {}).get("cells", []):
            for key, how in (("not_run", ""), ("graph_not_run", ", as CUDA graphs")):
                if key in cell:
                    part = f"length {cell['length']}, batch {cell['batch']}{how}"
                    found.setdefault(("speed", part, cell[key]), []).append(row)
    return [
        {"rows": rows, "evaluation": evaluation, "part": part, "reason": reason}
        for (evaluation, part, reason), rows in found.items()
    ]


def load_student(path: str | Path):
    """A student for evaluation.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    if not Path(path).exists() and str(path).count("/") != 1:  # a hub id has one; anything else would be asked for in vain
        raise UserError(
            f"{path} cannot be loaded as a student: there is no such folder; name a run folder or a whole student's folder"
        )
    try:
        return students.load(path).eval()
    except Exception as error:  # what transformers raises on damaged files is of every type
        if ran_out(error):
            raise
        said = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be loaded as a student: {said}; name a run folder or a whole student's folder"
        ) from error


def check_teacher(student, teacher: teachers.Teacher, path: str | Path) -> None:
    """Refuse to compare a student with a teacher that is not its own.

    Raises:
        UserError: another vocabulary, or another fingerprint than the student was made from.
    """
    if student.config.vocab_size != teacher.config.vocab_size:
        raise UserError(
            f"{path} has a vocabulary of {student.config.vocab_size}, but the teacher {teacher.reference} one of "
            f"{teacher.config.vocab_size}: they cannot be compared token by token"
        )
    made_from = student.config.distill.get("teacher", {})
    if made_from.get("fingerprint", teacher.fingerprint) != teacher.fingerprint:
        raise UserError(
            f"{path} was distilled from {made_from['reference']} (fingerprint {made_from['fingerprint']}), not from "
            f"{teacher.reference} (fingerprint {teacher.fingerprint}); pass its own teacher with --teacher"
        )


def _recipe_for(student, path: str | Path, teacher: str | None) -> Recipe:
    """What a checkpoint outside a run folder is judged with."""
    reference = teacher or student.config.distill.get("teacher", {}).get("reference")
    if reference is None:
        raise UserError(f"{path} does not say which teacher it was distilled from; pass it with --teacher")
    data = Data(train=[SHIPPED_HELDOUT], heldout=[SHIPPED_HELDOUT], seq_len=512, batch=1)
    layout = student.layout
    return Recipe(
        name="eval", teacher=reference, pattern=layout.pattern, mixers=layout.mixers, data=data, stages=[{"initialise": {}}]
    )
