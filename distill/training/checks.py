"""Checks of a recipe before anything is made: `plan`, `run` and `select` refuse what these find.

`check_here` needs the recipe and this machine alone. `check_fit` also needs the sizes of the teacher, whose weights may be
on the meta device, so a plan, which loads none, gives the same errors as a run. `check_session` needs a session with loaded
text and teacher, as a run and `plan --check` open it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from distill import moments, processes
from distill.build import empty
from distill.errors import UserError
from distill.exporters import check_exports, check_writers
from distill.memory import check_room_for
from distill.recipe import Recipe
from distill.runs.session import Session, check_device, check_length
from distill.selection.checking import check_lengths, measured_stages, replacing_options, selection_options
from distill.selection.present import numbered
from distill.selection.resolution import cost_of, even_recipe
from distill.selection.switched import check_stand_in
from distill.stages import check_student, key_of, stages_of
from distill.stages.layouts import first_layout, students_of
from distill.stages.texts import own_sources
from distill.text.files import files_of
from distill.training import trackers
from distill.training.beginning import check_sizes
from distill.training.caches import check_caches
from distill.training.shares import bytes_of
from distill.training.teaching import check_other_teachers, check_teaching
from distill.training.twin import check_twin
from students.config import Layout
from students.skeleton import Student
from teachers.int8 import check_installed
from teachers.teacher import Teacher

FLOAT = 4  # bytes of a parameter in float32
WINDOWS = ("window", "size")  # options of mixers, and of their window branches, that are window sizes in tokens


@dataclass(frozen=True)
class Fit:
    """A recipe that fits its teacher.

    recipe: has letters as its pattern, an even one where the run selects the layers. layout: the first one. students: that
    of each stage, without weights. student: the last of them.
    """

    recipe: Recipe
    layout: Layout
    students: list[Student]
    student: Student

    @property
    def layouts(self) -> list[Layout]:
        """The layout of each stage."""
        return [student.layout for student in self.students]


def check_here(recipe: Recipe, trains: bool = True, world: int | None = None) -> None:
    """Refuse what this machine cannot do: a missing device, tracker, package or text, or a batch that the run's processes
    cannot share.

    Args:
        trains: whether the stages will run; if not, training text, optimizers, trackers and batches are not checked.
        world: the number of processes that will share the run; None: those that are running.

    Raises:
        UserError: naming the key and the value.
    """
    processes.check_launch()
    check_device(recipe)
    _check_quantiser(recipe)
    if trains:
        check_writers(recipe)
        _check_optimizers(recipe)
    for part in ("heldout", "train") if trains else ("heldout",):
        for index, source in enumerate(getattr(recipe.data, part)):
            files_of(source, f"data.{part}.{index}")
    if trains:
        for where, sources in own_sources(recipe).items():
            for index, source in enumerate(sources):
                files_of(source, f"{where}.{index}")
        trackers.check(recipe)
        check_caches(recipe)
        check_shared(recipe, world or processes.count())


def _check_quantiser(recipe: Recipe) -> None:
    """Refuse an int8 teacher if the package for it is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    if recipe.teacher_dtype == "int8":
        try:
            check_installed()
        except ImportError as error:
            raise UserError(f"{recipe.name}: teacher_dtype is 'int8': {error}") from error


def _check_optimizers(recipe: Recipe) -> None:
    """Refuse a stage's optimizer if the package for it is not installed.

    Raises:
        UserError: naming the key, with the command that installs it.
    """
    for entry in stages_of(recipe):
        if getattr(entry.options, "optimizer", None) == moments.EIGHT_BIT:
            try:
                moments.check_installed()
            except ImportError as error:
                key = f"{key_of(recipe, entry)}.optimizer"
                raise UserError(f"{recipe.name}: {key} is {moments.EIGHT_BIT!r}, which {error}") from error


def check_shared(recipe: Recipe, count: int) -> None:
    """Refuse batches that `count` processes cannot share.

    Raises:
        UserError: naming the key.
    """
    for entry in stages_of(recipe):
        batch, own = entry.batch(recipe.data), getattr(entry.options, "batch", None)
        if entry.kind.trains and batch % count:
            key = f"stages.{entry.index}.{entry.name}.batch" if own else "data.batch"
            raise UserError(
                f"{recipe.name}: {key} is {batch}, and a batch of {batch} windows cannot be shared by {count} processes; "
                f"make it a multiple of {count}"
            )
        if entry.kind.text == "pairs" and batch // count % 2:
            raise UserError(
                f"{recipe.name}: stages.{entry.index}.{entry.name}.batch is {batch} windows, which {count} processes cannot "
                f"share without splitting a pair of windows; make it a multiple of {2 * count}"
            )


def check_fit(recipe: Recipe, teacher: Teacher) -> Fit:
    """Refuse lengths beyond the teacher's positions, a `student` of other sizes than the teacher, and an impossible
    selection, layout, option, rate, export or twin.

    Args:
        teacher: its weights may be on the meta device, and it needs no tokenizer.

    Raises:
        UserError: naming the recipe and what does not fit.
    """
    check_length(recipe, teacher)
    check_sizes(recipe, teacher)
    given = recipe
    if recipe.selects:  # the layout is not known yet; an even one stands for it
        recipe = _even(recipe, teacher)
    layout = first_layout(recipe, teacher.n_layers, recipe.name)
    students = students_of(recipe, teacher, layout, recipe.name)
    student = students[-1] if students else empty(teacher, layout)
    _check_windows(given, teacher)
    check_student(recipe, students, recipe.name)
    check_other_teachers(recipe, teacher)
    check_exports(recipe, student.config)
    fit = Fit(recipe, layout, students, student)
    check_twin(recipe, layout, fit.layouts, teacher)
    for entry in measured_stages(recipe):
        key = f"{key_of(recipe, entry)}.pattern"
        check_lengths(recipe, replacing_options(recipe, entry, recipe.name), teacher, key)
        before = fit.layouts[entry.index - 1] if entry.index else layout
        there = [layer for layer in range(teacher.n_layers) if layer not in before.converted]
        numbered(recipe, entry, there, teacher.n_layers)
    return fit


def _even(recipe: Recipe, teacher: Teacher) -> Recipe:
    """The recipe with an even layout, after checks of its selection: lengths, stand-ins, budget and task files."""
    options, sizes = selection_options(recipe), (teacher.n_layers, teacher.config.num_attention_heads)
    check_lengths(recipe, options, teacher)
    check_stand_in(recipe, options, teacher)
    even = even_recipe(recipe, *sizes)
    cost_of(options, *sizes)
    return even


def _check_windows(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse windows of mixers that are wider than the teacher's number of positions.

    Raises:
        UserError: naming the key.
    """
    room = teacher.positions(recipe.meta_tokens)
    for letter, options in recipe.mixers.items():
        for key, width in _windows_in(options, f"mixers.{letter}"):
            if room is not None and width > room:
                raise UserError(
                    f"{recipe.name}: {key} is {width}, but {teacher.reference} has positions for {room} tokens, so it would "
                    f"never limit attention; make it {room} or less"
                )


def _windows_in(options: Mapping, place: str) -> Iterator[tuple[str, int]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _windows_in(value, f"{place}.{name}")
        elif name in WINDOWS and isinstance(value, int):
            yield f"{place}.{name}", value


def check_session(session: Session) -> Fit:
    """Run `check_fit`, and also check the memory of the device and the loaded text.

    Raises:
        UserError: as `check_fit`; also for too little memory or text.
    """
    fit = check_fit(session.recipe, session.teacher)
    check_memory(session.recipe, fit, session.teacher.device)
    check_teaching(session, fit.students)
    if session.recipe.selects or measured_stages(session.recipe):
        session.check_selection_text()
    return fit


def check_memory(recipe: Recipe, fit: Fit, device: torch.device) -> None:
    """Refuse mixers, or a stage's parameters, gradients and moments, that are larger than the device's whole memory.

    Raises:
        UserError: naming both sizes, the stage and the mixers' options.
    """
    said = "; ".join(f"{letter}: {options}" for letter, options in fit.recipe.mixers.items())
    smaller = f"smaller options of the mixers ({said}) or fewer converted layers"
    mixers = sum(parameter.numel() for parameter in nn.ModuleList(fit.student.mixers.values()).parameters())
    check_room_for(FLOAT * mixers, device, f"{recipe.name}: the mixers", smaller)
    for entry in stages_of(recipe):
        trained = entry.kind.count(fit.students[entry.index], entry.options)
        shares = processes.count() if entry.kind.whole_student and recipe.shard != "none" else 1
        less = f", or stages.{entry.name}.train=mixers" if getattr(entry.options, "train", "mixers") == "all" else ""
        check_room_for(
            bytes_of(trained, entry.options) / shares,
            device,
            f"{recipe.name}: the {trained:,} parameters of stage {entry.name}, their gradients and AdamW's moments"
            + (f", divided by {shares} processes," if shares > 1 else ""),
            f"{smaller}{less}",
        )
