"""Which layers, or heads, stay attention: SCORERS is the table of ways to choose.

A recipe says `pattern: {keep: 0.25, by: recall}` in place of letters, and its run selects before it trains; `distill select`
does the same and shows it. To add a scorer: a file beside this one with a subclass of `Scorer`, its `Options`, and a line in
SCORERS.

What every scorer measures is untrained: a layer's attention is replaced by a window of 64 tokens and 4 sinks (or, with
`stand_in: mixer`, by the recipe's own mixer after its initialise stage), so the recall that a selection predicts is where
training starts, not where it ends.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pydantic import ValidationError

from distill.errors import UserError, nearest
from distill.recipe import Recipe
from distill.schema import explain
from students.config import KEEP

if TYPE_CHECKING:
    from distill.selection.options import Options
    from distill.selection.scorer import Scorer

SCORERS = {
    "uniform": "distill.selection.layers:UniformScorer",
    "recall": "distill.selection.layers:RecallScorer",
    "kl": "distill.selection.layers:DivergenceScorer",
    "task": "distill.selection.layers:TaskScorer",
    "retrieval-heads": "distill.selection.heads:RetrievalHeads",
    "greedy": "distill.selection.greedy:Greedy",
    "gates": "distill.selection.gates:Gates",
}


def scorer_class(name: str) -> "type[Scorer]":
    """The class behind a scorer's name.

    Raises:
        UserError: the name is not in the table.
    """
    if name not in SCORERS:
        raise UserError(f"there is no scorer {name!r}; {nearest(name, SCORERS)}")
    module, _, attribute = SCORERS[name].partition(":")
    return getattr(import_module(module), attribute)


def selection_options(recipe: Recipe, where: str | None = None) -> "Options":
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
    scorer_class(name).check(recipe, options, where)
    return options


def check_selection(recipe: Recipe, where: str) -> None:
    """Refuse a `pattern` that asks for a selection that cannot be; nothing to do where the layout is written out.

    Raises:
        UserError: naming the key, and the nearest valid one.
    """
    if recipe.selects:
        selection_options(recipe, where)


def _check_rest(recipe: Recipe, options: "Options", where: str) -> None:
    letters = sorted(recipe.mixers)
    if options.rest is None and len(letters) > 1:
        raise UserError(f"{where}.rest is missing: with mixers for {', '.join(letters)} it says which layers get which")
    rest = set(options.rest or letters[0])
    if KEEP in rest:
        raise UserError(f"{where}.rest is {options.rest!r}; {KEEP} is the letter of the layers that are kept")
    if unknown := sorted(rest - set(letters)):
        raise UserError(f"{where}.rest uses {unknown[0]!r}, but no mixer is given for it; there are {', '.join(letters)}")
    if unused := sorted(set(letters) - rest):
        raise UserError(f"a mixer is given for {unused[0]!r}, but {where}.rest ({options.rest!r}) does not use it")
