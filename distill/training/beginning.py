"""A run that starts from a finished student: its weights put into the student that the teacher's layout gives, its record
taken over, and all of it checked."""

from pathlib import Path
from typing import cast

import torch

from distill.build import recall_transfers, transfer_report
from distill.errors import UserError
from distill.loading import check_teacher, load_student, load_student_tokenizer
from distill.mixed_types import join_types
from distill.recipe import Recipe
from distill.runs.run_dir import RunDir
from distill.starting import place_of, weights_hash
from students.mixers.transfer import Transfer
from students.skeleton import Student
from teachers.quiet import no_warnings
from teachers.teacher import Teacher


def begin_from(recipe: Recipe, teacher: Teacher, student: Student, transfers: dict[int, Transfer]) -> set[str]:
    """Give a student, as it was built from the teacher, the weights of the one that the recipe starts from.

    Skeletons' tensors that are the teacher's stay in its memory; others get their own, no narrower than they are saved.

    Returns:
        the names of the skeleton's tensors that differ from the teacher's.

    Raises:
        UserError: the student is of another teacher, tokenizer, or layout, or its files are damaged.
    """
    start = cast(str, recipe.student)
    place = place_of(start, f"{recipe.name}: student")
    found = load_student(place)
    check_teacher(found, teacher, place)
    _check_tokenizer(place, teacher)
    if found.layout != student.layout:
        raise UserError(f"{place} has the layout {found.layout}, but the recipe says {student.layout}; leave the layout out")
    theirs = dict(found.named_parameters()) | dict(found.named_buffers())
    changed = set()
    with torch.no_grad():
        for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
            new = theirs[name].to(tensor.device)
            own = name.startswith(student.own_prefixes)
            if not own and new.shape == tensor.shape and torch.equal(new.to(tensor.dtype), tensor):
                continue
            tensor.data = new.to(torch.promote_types(new.dtype, tensor.dtype), copy=True)
            changed |= set() if own else {name}
    join_types(student)
    _take_record(Path(start), place, student, transfers)
    return changed


def check_start(recipe: Recipe, folder: RunDir, writes: bool) -> None:
    """Compare the weights that a run starts from with those it was started with; record them the first time.

    Raises:
        UserError: they are others now.
    """
    if recipe.student is None:
        return
    now = weights_hash(place_of(recipe.student, f"{recipe.name}: student"))
    known = folder.read("run.json", {}).get("student")
    if known is not None and known["sha256"] != now:
        raise UserError(
            f"{folder.path}: the student {recipe.student} is not the one this run was started with: its weights differ; "
            "bring it back, or start again with --fresh"
        )
    if writes and known is None:
        folder.update("run.json", student={"reference": recipe.student, "sha256": now})


def record_start(recipe: Recipe, teacher: Teacher, student: Student, transfers: dict, folder: RunDir) -> None:
    """Write where the student's weights came from, where the run has not yet."""
    if recipe.student is not None and folder.read("transfer.json") is None:
        folder.write("transfer.json", transfer_report(teacher, student, transfers))


def _take_record(reference: Path, place: Path, student: Student, transfers: dict[int, Transfer]) -> None:
    """The transfer record of the run that made the student, where it is one; else that it came from there."""
    known = RunDir(reference).read("transfer.json", {}) if reference != place else {}
    if known:
        recall_transfers(student, transfers, known)
        return
    for transfer in transfers.values():
        transfer.sources.update(dict.fromkeys(transfer.sources, f"of the student {reference}"))


def _check_tokenizer(place: Path, teacher: Teacher) -> None:
    """Refuse a student whose own tokenizer is another than the teacher's.

    Raises:
        UserError: naming the first entry that differs.
    """
    if not (place / "tokenizer.json").is_file() or teacher.tokenizer is None:
        return
    with no_warnings():
        own = load_student_tokenizer(place).get_vocab()
    theirs = teacher.tokenizer.get_vocab()
    if own != theirs:
        name = min(entry for entry in {*own, *theirs} if own.get(entry) != theirs.get(entry))
        raise UserError(
            f"{place} has another tokenizer than the teacher {teacher.reference}: {name!r} is {own.get(name)} there and "
            f"{theirs.get(name)} here; bring its own back, or start from another student"
        )
