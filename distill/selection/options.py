"""What a recipe may say under `pattern` where its layout is selected, whatever the scorer: {keep: ..., by: SCORER, ...}."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill.errors import nearest
from distill.evaluation.recall.families import FAMILIES
from distill.ranges import LONGEST, MANY, Range, whole
from distill.recipe import Recipe
from distill.schema import Count, Schema
from distill.stages.layouts import later_letters

Whole = Annotated[int, whole(1, MANY)]
Part = Annotated[float, Range(0, 1, above=True, below=True)]


class Options(Schema):
    """What every scorer takes.

    keep: how many layers stay attention, or their share. by: the scorer. rest: the letters that the other layers get, in
    turn; may be left out where `mixers` has one letter. protect: layers that stay attention whatever they score; they are
    among the kept ones. periodic: keep every n-th layer alone, those with (i + 1) % n = 0, which more engines run; no layer
    is protected then.
    stand_in: what stands for a layer's attention while it is measured: "window" (of `window` tokens and `sinks`, untrained),
    or "mixer", the recipe's own after its initialise stage.
    families, length, trials: the made-up texts of recall. tokens: held-out text for the KL, from its end: the tables of a
    run read its beginning.
    """

    keep: Whole | Part
    by: str
    rest: str | None = None
    protect: list[Annotated[int, whole(0, MANY)]] = [0]
    periodic: bool = False
    stand_in: Literal["window", "mixer"] = "window"
    window: Annotated[int, whole(1, LONGEST)] = 64
    sinks: Annotated[int, whole(0, LONGEST)] = 4
    families: Annotated[list[str], Field(min_length=1)] = ["key_value", "passkey"]
    length: Annotated[int, whole(64, LONGEST)] = 512
    trials: Whole = 6
    tokens: Count = 2048

    @model_validator(mode="before")
    @classmethod
    def _protect_none(cls, given: Any) -> Any:
        return {"protect": [], **given} if isinstance(given, dict) and given.get("periodic") else given

    @model_validator(mode="after")
    def _families_exist(self) -> "Options":
        for family in self.families:
            if family not in FAMILIES:
                raise ValueError(f"there is no recall family {family!r}; {nearest(family, FAMILIES)}")
        return self


def rest_of(recipe: Recipe, options: Options) -> str:
    """The letters of the layers that are not kept."""
    later = later_letters(recipe)
    return options.rest or next((letter for letter in recipe.mixers if letter not in later), next(iter(recipe.mixers)))


def described(options: Options) -> dict[str, Any]:
    """The options, for JSON."""
    return options.model_dump(mode="json")
