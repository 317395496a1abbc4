"""The start of a run from a finished student: loads and checks its weights, and takes over its transfer record."""

from pathlib import Path
from typing import cast

import torch

from distill.build import recall_transfers, transfer_report
from distill.errors import UserError
from distill.loading import check_teacher, check_vocabulary, load_student, load_student_tokenizer, student_config
from distill.mixed_types import join_types
from distill.recipe import Recipe
from distill.runs.run_dir import RunDir
from distill.starting import place_of, weights_hash
from students.mixers.transfer import Transfer
from students.skeleton import Student
from teachers.quiet import no_warnings
from teachers.teacher import Teacher

SIZES = {"num_hidden_layers": "layers", "hidden_size": "channels (hidden_size)"}  # of student and teacher, by config entry


def check_sizes(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse a `student` whose vocabulary, number of layers or width differs from the teacher's, by the two configs.

    Args:
        teacher: its weights may be on the meta device.

    Raises:
        UserError: naming the student's folder and both numbers.
    """
    if recipe.student is None:
        return
    place = place_of(recipe.student, f"{recipe.name}: student")
    config = student_config(place)
    check_vocabulary(config, teacher, place)
    for key, unit in SIZES.items():
        own, theirs = getattr(config, key), getattr(teacher.config, key)
        if own != theirs:
            raise UserError(
                f"{place} has {own} {unit}, but the teacher {teacher.reference} has {theirs}; name a student of this "
                "teacher, or the student's own teacher"
            )


def begin_from(recipe: Recipe, teacher: Teacher, student: Student, transfers: dict[int, Transfer]) -> set[str]:
    """Give a student that was built from the teacher the weights of the recipe's `student`.

    Backbone tensors that equal the teacher's stay in the teacher's memory. Others get their own, at least as wide as saved.

    Returns:
        the names of the backbone's tensors that differ from the teacher's.

    Raises:
        UserError: the saved student has another teacher, tokenizer or layout, or its files are damaged.
    """
    start = cast(str, recipe.student)
    place = place_of(start, f"{recipe.name}: student")
    found = load_student(place)
    check_teacher(found, teacher, place)
    _check_tokenizer(place, teacher)
    if found.layout != student.layout:
        raise UserError(f"{place} has the layout {found.layout}, but the recipe says {student.layout}; leave pattern out")
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
    """Check that the weights a run starts from are still the same; the first time, record their hash.

    Raises:
        UserError: the weights differ.
    """
    if recipe.student is None:
        return
    now = weights_hash(place_of(recipe.student, f"{recipe.name}: student"))
    known = folder.read("run.json", {}).get("student")
    if known is not None and known["sha256"] != now:
        raise UserError(
            f"{folder.path}: the weights of the student {recipe.student} differ from those that this run was started with; "
            "restore them, or start again with --fresh"
        )
    if writes and known is None:
        folder.update("run.json", student={"reference": recipe.student, "sha256": now})


def record_start(recipe: Recipe, teacher: Teacher, student: Student, transfers: dict, folder: RunDir) -> None:
    """Write the transfer report of a run that starts from a student, unless it exists."""
    if recipe.student is not None and folder.read("transfer.json") is None:
        folder.write("transfer.json", transfer_report(teacher, student, transfers))


def _take_record(reference: Path, place: Path, student: Student, transfers: dict[int, Transfer]) -> None:
    """Take over the transfer record of the run that made the student; without one, name the student as the source."""
    known = RunDir(reference).read("transfer.json", {}) if reference != place else {}
    if known:
        recall_transfers(student, transfers, known)
        return
    for transfer in transfers.values():
        transfer.sources.update(dict.fromkeys(transfer.sources, f"of the student {reference}"))


def _check_tokenizer(place: Path, teacher: Teacher) -> None:
    """Refuse a student whose own tokenizer differs from the teacher's.

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
            f"{theirs.get(name)} here; restore the student's own tokenizer, or start from another student"
        )
