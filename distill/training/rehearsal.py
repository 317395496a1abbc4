"""The rehearsal: steps of the end of a run (evaluation rows, files, exports, report), tried before it trains."""

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

TRIAL_TOKENS = 2  # tokens that teacher and student generate
ROOM = 1.02  # bytes of a saved folder, relative to those of its weights


@torch.no_grad()
def rehearse(recipe: Recipe, teacher: Teacher, student: Student) -> None:
    """Try the steps that need neither text nor a run folder.

    These are: the rows of the final table, the lengths of its questions, saving the student (one tensor of it), loading the
    saved folder, exporting it, and generating.

    Args:
        student: newly built from the teacher.

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
        with _tried(recipe, "save the teacher's tokenizer with it"), no_warnings():
            cast(PreTrainedTokenizerBase, teacher.tokenizer).save_pretrained(saved)
        with _tried(recipe, "load the saved student"), no_warnings():
            AutoConfig.from_pretrained(saved)
            AutoTokenizer.from_pretrained(saved)
        for kind in recipe.export:
            with _tried(recipe, f"export to {kind}"):
                target(kind).rehearse(saved, Path(place) / kind, Form())
    with _tried(recipe, "generate with teacher and student"), no_warnings():
        continuations(teacher, student, TRIAL_TOKENS)


@torch.no_grad()
def rehearse_report(session: Session, student: Student, folder: RunDir) -> None:
    """Try the report of a run without writing it: its pictures and its page. Also check the free disk space.

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
    """Refuse passkey texts that have more tokens than the teacher has positions, counted with its tokenizer.

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
    """Refuse to begin if the disk has no room for the students and exports that the run will write.

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
            f"and {_size(free)} are free; make room there, or choose another folder with --runs"
        )


def _exported_bytes(student: Student) -> int:
    """The bytes of an export: the weights in the usual type, and in float32 those that keep it."""
    kept, narrow = kept_in_float32(student), getattr(torch, Form().dtype).itemsize
    sizes = {name: tensor.numel() for name, tensor in student.named_parameters()}
    wide = {name for name in sizes if kept & set(name.split("."))}
    return sum(count * (torch.float32.itemsize if name in wide else narrow) for name, count in sizes.items())


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


@contextmanager
def _tried(recipe: Recipe, what: str) -> Iterator[None]:
    """Turn an error of any type in the block into one that says that the run would have failed after its training.

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
            f"{recipe.name}: at its end the run could not {what}: {type(error).__name__}: {reason_of(error)}; fix this "
            "first, nothing has been trained yet"
        ) from error
