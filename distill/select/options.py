"""What a recipe may say under `pattern` where its layout is selected: {keep: ..., by: SCORER, ...}, one schema a scorer."""

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from distill.errors import UserError, nearest
from distill.evaluate.suites import SIX
from distill.recipe import Count, Recipe, Schema, explain
from students.config import KEEP

if TYPE_CHECKING:
    from distill.select.scorer import Scorer

SCORERS = {
    "uniform": "distill.select.layers:Uniform",
    "recall": "distill.select.layers:Recall",
    "kl": "distill.select.layers:Divergence",
    "task": "distill.select.layers:Task",
    "retrieval-heads": "distill.select.heads:RetrievalHeads",
    "greedy": "distill.select.greedy:Greedy",
    "gates": "distill.select.gates:Gates",
}
Whole = Annotated[int, Field(ge=1)]
Part = Annotated[float, Field(gt=0, lt=1)]


class Options(Schema):
    """What every scorer takes.

    keep: how many layers stay attention, or their share. by: the scorer. rest: the letters that the other layers get, in
    turn; may be left out where `mixers` has one letter. protect: layers that stay attention whatever they score; they are
    among the kept ones.
    stand_in: what stands for a layer's attention while it is measured: "window" (of `window` tokens and `sinks`, untrained),
    or "mixer", the recipe's own after its initialise stage.
    families, length, trials: the made-up texts of recall. tokens: held-out text for the KL, from its end: the tables of a
    run read its beginning.
    """

    keep: Whole | Part
    by: str
    rest: str | None = None
    protect: list[Annotated[int, Field(ge=0)]] = [0]
    stand_in: Literal["window", "mixer"] = "window"
    window: Whole = 64
    sinks: Annotated[int, Field(ge=0)] = 4
    families: Annotated[list[str], Field(min_length=1)] = ["key_value", "passkey"]
    length: Annotated[int, Field(ge=64)] = 512
    trials: Whole = 6
    tokens: Count = 2048

    @model_validator(mode="after")
    def _families_exist(self):
        from distill.evaluate.recall import FAMILIES

        for family in self.families:
            if family not in FAMILIES:
                raise ValueError(f"there is no recall family {family!r}; {nearest(family, FAMILIES)}")
        return self


class TaskOptions(Options):
    """tasks: a folder of task files (distill/evaluate/task_files.py). names: of them. items: of each, drawn by a seed."""

    tasks: str
    names: Annotated[list[str], Field(min_length=1)] = list(SIX)
    items: Whole = 50

    @model_validator(mode="after")
    def _tasks_exist(self):
        from distill.evaluate.tasks import TASKS

        for name in self.names:
            if name not in TASKS:
                raise ValueError(f"there is no task {name!r}; {nearest(name, TASKS)}")
        return self


class HeadOptions(Options):
    """keep: how many heads outside the protected layers stay attention, or their share; those layers stay whole as well.
    ablate: "zero" leaves a head's output out, as the paper does; "window" lets it see `window` tokens and `sinks`, so that
    heads which look nearby only are not taken for retrieval heads."""

    ablate: Literal["zero", "window"] = "zero"
    families: Annotated[list[str], Field(min_length=1)] = ["key_value"]


class GreedyOptions(Options):
    """measure: what is to be kept, "recall" or "kl". beam: how many layouts are followed at a time. look_ahead: how many of
    the layers that helped most a step earlier are tried again; None for all."""

    measure: Literal["recall", "kl"] = "recall"
    beam: Whole = 2
    look_ahead: Whole | None = 8


class GateOptions(Options):
    """training_tokens: the paper's 20M by default. lr: of Adam, on the gates alone. retrieval: share of the steps that read
    made-up recall texts, the others reading the recipe's training text. save: steps between two saves."""

    training_tokens: Count = 20_000_000
    lr: Annotated[float, Field(gt=0)] = 0.05
    retrieval: Annotated[float, Field(ge=0, le=1)] = 0.5
    save: Whole = 20


def scorer_class(name: str) -> "type[Scorer]":
    """The class behind a scorer's name.

    Raises:
        UserError: the name is not in the table.
    """
    if name not in SCORERS:
        raise UserError(f"there is no scorer {name!r}; {nearest(name, SCORERS)}")
    module, _, attribute = SCORERS[name].partition(":")
    return getattr(import_module(module), attribute)


def options_of(recipe: Recipe, where: str | None = None) -> Options:
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


def rest_of(recipe: Recipe, options: Options) -> str:
    """The letters of the layers that are not kept."""
    return options.rest or next(iter(recipe.mixers))


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


def selects(recipe: Recipe) -> bool:
    """Whether the recipe's layout is selected, not written out."""
    return isinstance(recipe.pattern, dict)


def described(options: Options) -> dict[str, Any]:
    """The options, for JSON."""
    return options.model_dump(mode="json")
