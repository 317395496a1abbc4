"""What the end of a run needs, tried before it trains: its rows, its questions, its files, its exports, its report."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from distill.build import empty
from distill.compat import kept_in_float32
from distill.errors import UserError, reason_of
from distill.evaluation.recall import passkey_lengths
from distill.evaluation.rows import layouts
from distill.evaluation.samples import continuations, matrices
from distill.evaluation.stored import evaluations_of
from distill.evaluation.suites import suite_of_run
from distill.exporters import target
from distill.exporters.target import Form
from distill.memory import ran_out
from distill.recipe import Recipe
from distill.reports.run_page import run_page
from distill.reports.tables import markdown_report
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from students.skeleton import Student
from teachers.quiet import no_bars_in_logs, no_warnings
from teachers.teacher import Teacher

TRIAL_TOKENS = 2  # that teacher and student go on with
ROOM = 1.02  # bytes of a folder in those of its weights


@torch.no_grad()
def rehearse(recipe: Recipe, teacher: Teacher, student: Student) -> None:
    """Try what needs neither text nor a run folder: the rows of the last table, the lengths of its questions, saving the
    student (one tensor of it), loading what was saved, exporting it, and generating with it.

    Args:
        student: as it is built from the teacher.

    Raises:
        UserError: naming what would fail and why.
    """
    for row, layout in layouts(student.layout).items():
        with _tried(recipe, f"judge the row {row}"):
            empty(teacher, layout)
    check_questions(recipe, teacher)
    with TemporaryDirectory(prefix="distill-") as place:
        saved = Path(place) / "student"
        with _tried(recipe, "save the student"), no_bars_in_logs(), no_warnings():
            name, tensor = min(student.state_dict().items(), key=lambda item: item[1].numel())
            student.save_pretrained(saved, state_dict={name: tensor.clone()})
        with _tried(recipe, "save the teacher's tokenizer beside it"), no_warnings():
            cast(PreTrainedTokenizerBase, teacher.tokenizer).save_pretrained(saved)
        with _tried(recipe, "load what it saved"), no_warnings():
            AutoConfig.from_pretrained(saved)
            AutoTokenizer.from_pretrained(saved)
        for kind in recipe.export:
            with _tried(recipe, f"export to {kind}"):
                target(kind).rehearse(saved, Path(place) / kind, Form())
    with _tried(recipe, "let teacher and student go on with a text"), no_warnings():
        continuations(teacher, student, TRIAL_TOKENS)


@torch.no_grad()
def rehearse_report(session: Session, student: Student, folder: RunDir) -> None:
    """Try the report of a run without writing it: its pictures, its page, and whether the disk has room for what comes
    beside it.

    Raises:
        UserError: naming what would fail and why.
    """
    recipe = session.recipe
    _check_room(recipe, student, folder)
    with _tried(recipe, "draw the matrices of its layers"), session.accelerator.autocast():
        matrices(session, student)
    with _tried(recipe, "write its report"):
        run_page(folder)
        markdown_report(folder, evaluations_of(folder))


def check_questions(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse passkeys in texts that the teacher has no positions for, as its tokenizer cuts them.

    Raises:
        UserError: naming the key and both lengths.
    """
    suite, _ = suite_of_run(recipe.evaluation).within(teacher.positions(recipe.meta_tokens))
    with _tried(recipe, "ask for its passkeys"):
        taken = passkey_lengths(cast(PreTrainedTokenizerBase, teacher.tokenizer), suite.passkey)
    for length, tokens in taken.items():
        room = teacher.positions(recipe.meta_tokens)
        if room is not None and tokens > room:
            raise UserError(
                f"evaluation.passkey is {list(recipe.evaluation.passkey)}, and the shortest text of {length} takes {tokens} "
                f"tokens of {recipe.teacher}, which has positions for {room}; take it out ('evaluation.passkey=[]')"
            )


def _check_room(recipe: Recipe, student: Student, folder: RunDir) -> None:
    """Refuse to begin where the disk cannot hold the students and exports that the run ends with.

    Raises:
        UserError: giving both sizes.
    """
    one = sum(tensor.numel() * tensor.element_size() for tensor in student.parameters())
    exported = _exported_bytes(student)
    places = {folder.student: one} | {folder.path / "export" / kind: exported for kind in recipe.export}
    places |= {folder.path / "twin" / "student": one} if recipe.twin else {}
    needed = ROOM * sum(size for place, size in places.items() if not place.exists())
    free = shutil.disk_usage(folder.path).free
    if needed > free:
        raise UserError(
            f"{os.strerror(errno.ENOSPC)}: the students and exports of this run will take {_size(needed)} in {folder.path}, "
            f"and {_size(free)} are free; make room there, or make runs elsewhere with --runs"
        )


def _exported_bytes(student: Student) -> int:
    """What an export of a student takes: its weights in the usual type, and in float32 those that stay in it."""
    kept, narrow = kept_in_float32(student), getattr(torch, Form().dtype).itemsize
    sizes = {name: tensor.numel() for name, tensor in student.named_parameters()}
    wide = {name for name in sizes if kept & set(name.split("."))}
    return sum(count * (torch.float32.itemsize if name in wide else narrow) for name, count in sizes.items())


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


@contextmanager
def _tried(recipe: Recipe, what: str) -> Iterator[None]:
    """Say of whatever fails in the block, which is of every type, that it would have failed after all training.

    Raises:
        UserError: naming the recipe, what was tried and the reason.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        raise UserError(
            f"{recipe.name}: at its end the run could not {what}: {type(error).__name__}: {reason_of(error)}; mend that "
            "first, nothing has been trained yet"
        ) from error
