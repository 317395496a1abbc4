"""Checks of a recipe's selection: its scorer, the scorer's options, and the letters of the other layers."""

from typing import Any, cast

from pydantic import ValidationError

from distill.errors import UserError, nearest
from distill.recipe import Recipe, Selected
from distill.schema import explain
from distill.selection import SCORERS, scorer_class
from distill.selection.options import Options, rest_of
from distill.selection.periodic import check_periodic
from distill.stages import StageEntry, key_of, stages_of
from distill.stages.layouts import EVEN, Further, later_letters
from students.config import KEEP
from teachers.teacher import Teacher


def selection_options(recipe: Recipe, where: str | None = None) -> Options:
    """The checked options of a recipe whose layout is selected.

    Raises:
        UserError: naming the key, and the nearest valid one.
    """
    where, given = f"{where or recipe.name}: pattern", cast(dict[str, Any], recipe.pattern)
    name = given.get("by")
    if name is None:
        raise UserError(f"{where}.by is missing; choose from {', '.join(SCORERS)}")
    if name not in SCORERS:
        raise UserError(f"{where}.by: there is no scorer {name!r}; {nearest(name, SCORERS)}")
    schema = scorer_class(name).Options
    try:
        options = schema(**given)
    except ValidationError as error:
        raise UserError(explain(error, where, schema)) from error
    _check_rest(recipe, options, where)
    check_periodic(options, where)
    scorer_class(name).check(recipe, options, where)
    return options


def replacing_options(recipe: Recipe, entry: StageEntry, where: str) -> Options:
    """The checked options of the scorer with which a stage chooses the layers that it converts.

    Raises:
        UserError: naming the key, and the nearest valid one; also for a scorer that cannot rank layers of a student.
    """
    where, given = f"{where}: {key_of(recipe, entry)}.pattern", cast(dict[str, Any], cast(Further, entry.options).pattern)
    name = given["by"]
    if name not in SCORERS:
        raise UserError(f"{where}.by: there is no scorer {name!r}; {nearest(name, [EVEN, *SCORERS])}")
    if reason := scorer_class(name).teacher_alone:
        raise UserError(f"{where}.by is {name!r}, which cannot choose layers of a student that has mixers: {reason}")
    if "rest" in given:
        raise UserError(f"{where}.rest is no option here; {key_of(recipe, entry)}.mixer names the letter of the layers")
    schema = scorer_class(name).Options
    try:
        return schema(**given)
    except ValidationError as error:
        raise UserError(explain(error, where, schema)) from error


def measured_stages(recipe: Recipe) -> list[StageEntry]:
    """The stages that choose the layers to convert with a scorer."""
    return [entry for entry in stages_of(recipe) if entry.kind.changes_layout and cast(Further, entry.options).scorer]


def marked(recipe: Recipe) -> Recipe:
    """The recipe with `selected` set where its stages choose layers with a scorer.

    `selected` names the recall families and tasks that the scorers read. These are in-sample in tables of the student."""
    before = [] if recipe.selected is None else [recipe.selected]
    found = before + [
        scorer_class(cast(str, cast(Further, entry.options).scorer)).selected_by(
            replacing_options(recipe, entry, recipe.name)
        )
        for entry in measured_stages(recipe)
    ]
    if found == before:
        return recipe
    by, families, tasks = (
        list(dict.fromkeys(name for names in column for name in names))
        for column in zip(*(([one.by], one.families, one.tasks) for one in found), strict=True)
    )
    return recipe.model_copy(update={"selected": Selected(by=", ".join(by), families=families, tasks=tasks)})


def check_selection(recipe: Recipe, where: str) -> None:
    """Refuse an impossible selection: in the recipe's `pattern`, or in a stage that converts further layers.

    Layouts that are written as letters need no check here.

    Raises:
        UserError: naming the key, and the nearest valid one.
    """
    if recipe.selects:
        selection_options(recipe, where)
    for entry in measured_stages(recipe):
        replacing_options(recipe, entry, where)


def check_lengths(recipe: Recipe, options: Options, teacher: Teacher, key: str = "pattern") -> None:
    """Refuse texts and windows of a selection that are longer than the teacher's positions. key: that of the options.

    Raises:
        UserError: naming the key and both lengths.
    """
    known = teacher.positions()
    for name in ("length", "window"):
        if known is not None and (asked := getattr(options, name)) > known:
            raise UserError(
                f"{recipe.name}: {key}.{name} is {asked}, but {teacher.reference} has positions for {known} tokens; make "
                f"it {known} or less"
            )


def _check_rest(recipe: Recipe, options: Options, where: str) -> None:
    later = later_letters(recipe)
    letters = sorted(set(recipe.mixers) - later) or sorted(recipe.mixers)
    if options.rest is None and len(letters) > 1:
        raise UserError(f"{where}.rest is missing: it gives the order of the mixers {', '.join(letters)} over the layers")
    rest = set(rest_of(recipe, options))
    if KEEP in rest:
        raise UserError(f"{where}.rest is {options.rest!r}; {KEEP} is the letter of the layers that are kept")
    if unknown := sorted(rest - set(recipe.mixers)):
        raise UserError(f"{where}.rest uses {unknown[0]!r}, but no mixer is given for it; there are {', '.join(letters)}")
    if unused := sorted(set(letters) - rest):
        raise UserError(f"a mixer is given for {unused[0]!r}, but {where}.rest ({options.rest!r}) does not use it")
