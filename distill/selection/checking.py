"""What a recipe asks of a selection, checked: its scorer, the scorer's options, and the letters of the other layers."""

from pydantic import ValidationError

from distill.errors import UserError, nearest
from distill.recipe import Recipe
from distill.schema import explain
from distill.selection import SCORERS, scorer_class
from distill.selection.options import Options, rest_of
from distill.selection.periodic import check_periodic
from students.config import KEEP
from teachers.teacher import Teacher


def selection_options(recipe: Recipe, where: str | None = None) -> Options:
    """The options of a recipe whose layout is selected, checked.

    Raises:
        UserError: naming the key, and the nearest valid one.
    """
    where, given = f"{where or recipe.name}: pattern", recipe.pattern
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


def check_selection(recipe: Recipe, where: str) -> None:
    """Refuse a `pattern` that asks for a selection that cannot be; nothing to do where the layout is written out.

    Raises:
        UserError: naming the key, and the nearest valid one.
    """
    if recipe.selects:
        selection_options(recipe, where)


def check_lengths(recipe: Recipe, options: Options, teacher: Teacher) -> None:
    """Refuse texts and windows of a selection that are longer than the teacher has positions for.

    Raises:
        UserError: naming the key and both lengths.
    """
    known = teacher.positions()
    for name in ("length", "window"):
        if known is not None and (asked := getattr(options, name)) > known:
            raise UserError(
                f"{recipe.name}: pattern.{name} is {asked}, but {teacher.reference} has positions for {known} tokens; make "
                f"it {known} or less"
            )


def _check_rest(recipe: Recipe, options: Options, where: str) -> None:
    letters = sorted(recipe.mixers)
    if options.rest is None and len(letters) > 1:
        raise UserError(f"{where}.rest is missing: with mixers for {', '.join(letters)} it says which layers get which")
    rest = set(rest_of(recipe, options))
    if KEEP in rest:
        raise UserError(f"{where}.rest is {options.rest!r}; {KEEP} is the letter of the layers that are kept")
    if unknown := sorted(rest - set(letters)):
        raise UserError(f"{where}.rest uses {unknown[0]!r}, but no mixer is given for it; there are {', '.join(letters)}")
    if unused := sorted(set(letters) - rest):
        raise UserError(f"a mixer is given for {unused[0]!r}, but {where}.rest ({options.rest!r}) does not use it")
