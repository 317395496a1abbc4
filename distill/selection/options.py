"""The options that every scorer has, under a recipe's `pattern: {keep: ..., by: SCORER, ...}`."""

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
    """Options of every scorer."""

    keep: Whole | Part
    """The number of layers that keep attention, or their share."""
    by: str
    """The name of the scorer."""
    rest: str | None = None
    """The letters of the other layers, repeated in this order. Leave it out where `mixers` has one letter."""
    protect: list[Annotated[int, whole(0, MANY)]] = [0]
    """Layers that keep attention whatever their score. They count among the kept ones; with `periodic` none is protected."""
    periodic: bool = False
    """Keep attention in every n-th layer only, where (i + 1) % n = 0, as MLX and SGLang require for gated DeltaNet. The
    output says what that costs by the scorer's own score."""
    stand_in: Literal["window", "mixer"] = "window"
    """What replaces a layer's attention during measurements: an untrained `window`, or the recipe's own `mixer` after its
    `initialise`."""
    window: Annotated[int, whole(1, LONGEST)] = 64
    """Tokens of the stand-in's window."""
    sinks: Annotated[int, whole(0, LONGEST)] = 4
    """First tokens of a document that the stand-in's window always sees."""
    families: Annotated[list[str], Field(min_length=1)] = ["key_value", "passkey"]
    """Families of synthetic recall texts. Tables of the student mark these families as in-sample, although the tables use
    other words."""
    length: Annotated[int, whole(64, LONGEST)] = 512
    """Tokens of a recall text."""
    trials: Whole = 6
    """Recall texts of each family."""
    tokens: Count = 2048
    """Held-out tokens for the KL, from the last quarter of the text, which no table reads."""

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
    """The options as JSON values."""
    return options.model_dump(mode="json")
