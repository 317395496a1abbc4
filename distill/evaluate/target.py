"""`distill eval`: what its target is, and whether the teacher is the right one."""

from collections.abc import Mapping
from pathlib import Path

import torch

import students
import teachers
from distill.errors import UserError
from distill.evaluate import judge_all
from distill.evaluate.fidelity import Heldout
from distill.evaluate.rows import rows_of
from distill.memory import enough_memory, ran_out
from distill.probe import probe
from distill.recipe import Data, Recipe, Text
from distill.run_dir import RunDir
from distill.session import Session

SHIPPED_HELDOUT = Text(path="shipped:heldout.jsonl.xz")


def evaluate_target(target: str | Path, teacher: str | None, heldout: str | None) -> dict:
    """See `distill.evaluate.evaluate`."""
    with enough_memory(f"judging {target}", "evaluation.tokens or evaluation.seq_len in its recipe, or judge it on a CPU"):
        return _evaluate(target, teacher, heldout)


def _evaluate(target: str | Path, teacher: str | None, heldout: str | None) -> dict:
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
    return judge_session(session, student, twin if twin and twin.exists() else None) | {"target": str(target)}


def judge_session(session: Session, student, twin: Path | None, known: Mapping[str, Mapping] | None = None) -> dict:
    """Every row's results, and the student's error in each converted layer; `known` as in `judge_all`."""
    options, teacher = session.recipe.evaluation, session.teacher

    def load_twin():
        return load_student(twin).to(teacher.device)

    rows = rows_of(teacher, lambda: student, student.layout, load_twin if twin else None)
    with torch.no_grad(), session.accelerator.autocast():
        heldout: Heldout = session.heldout(options.final_tokens or options.tokens)
        results = judge_all(teacher, rows, heldout, options, known or {})
        probed = probe(teacher, student, session.probe_batch())
    layers = {name.split("/")[1]: value**0.5 for name, value in probed.items() if name.startswith("align/")}
    return {"teacher": teacher.reference, "pattern": student.layout.pattern, "rows": results, "layers": layers}


def load_student(path: str | Path):
    """A student for evaluation.

    Raises:
        UserError: there is none, or its files are damaged.
    """
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
