"""The layouts of a run: the first one from the recipe's pattern, and one after each stage that converts further layers.

Where a stage's layers are chosen during the run, planning and checks take evenly spread ones (`Further.even`).
"""

from collections.abc import Sequence
from typing import Annotated, Any, cast

from pydantic import Field, field_validator, model_validator

from distill.build import empty, layout_of
from distill.errors import UserError
from distill.ranges import MANY, whole
from distill.recipe import Recipe
from distill.schema import Letter, Schema
from distill.stages import StageEntry, key_of, stages_of
from students.config import KEEP, Layout
from students.converting import further
from students.skeleton import Student
from teachers.teacher import Teacher

EVEN = "even"  # the choice of layers that needs no measurement


class Further(Schema):
    """Options of a stage that converts further layers: which layers, and to which mixer."""

    layers: Annotated[list[Annotated[int, whole(0, MANY)]], Field(min_length=1)] | None = None
    """The numbers of the layers to convert, from 0."""
    pattern: str | dict[str, Any] | None = None
    """In place of `layers`: the layout after the stage, as letters that repeat over depth; or `{keep: 8, by: even}`: how
    many layers (or which share of all) keep attention, and how they are chosen: `even`, or a scorer with its options,
    which measures the student at that point of the run (`retrieval-heads`, which chooses heads, is refused). Without
    `layers` and `pattern`, every second attention layer is converted. See docs/students.md#progressive-replacement."""
    mixer: Letter | None = None
    """The letter of the recipe's `mixers` that the layers get. Leave it out where the recipe has one letter, or where
    `pattern` consists of letters."""

    @field_validator("pattern")
    @classmethod
    def _pattern_is_one(cls, pattern: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        if isinstance(pattern, dict):
            if not isinstance(pattern.get("by"), str):
                raise ValueError("`by`, the way to choose the layers, is missing; by: even spreads them evenly")
            if "keep" not in pattern:
                raise ValueError("`keep`, the number of layers that keep attention, is missing")
            if pattern["by"] == EVEN and (unknown := sorted(set(pattern) - {"by", "keep"})):
                raise ValueError(f"by: even has no option but keep; leave {unknown[0]!r} out")
            keep = pattern["keep"]
            count = isinstance(keep, int) and not isinstance(keep, bool) and 0 <= keep <= MANY
            if not count and not (isinstance(keep, float) and 0 < keep < 1):
                raise ValueError(f"keep is {keep!r}; it should be a number of layers, or a share of them between 0 and 1")
        elif pattern is not None and not (pattern.isascii() and pattern.isalpha() and pattern.isupper()):
            raise ValueError("it should be capital letters, one a layer, or a mapping with keep and by")
        return pattern

    @model_validator(mode="after")
    def _one_way(self) -> "Further":
        if self.layers is not None and self.pattern is not None:
            raise ValueError("layers and pattern both say what is converted; leave one of them out")
        if self.mixer is not None and isinstance(self.pattern, str):
            raise ValueError(f"mixer is {self.mixer!r}, but the letters of pattern already name the mixers; leave mixer out")
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers is {self.layers}, which names a layer twice")
        return self

    @property
    def scorer(self) -> str | None:
        """The name of the scorer that chooses the layers; None if the choice needs no measurement."""
        by = self.pattern["by"] if isinstance(self.pattern, dict) else EVEN
        return None if by == EVEN else by

    def letters(self, mixers: dict[str, dict]) -> set[str]:
        """The letters that the stage gives to layers. mixers: the recipe's."""
        if isinstance(self.pattern, str):
            return set(self.pattern) & set(mixers)
        return {self.mixer} if self.mixer else set(mixers) if len(mixers) == 1 else set()

    @property
    def _keep(self) -> int | float:
        return cast(dict[str, Any], self.pattern)["keep"]

    def kept(self, depth: int) -> int:
        """The number of layers that keep attention in a model of `depth` layers, from `pattern.keep`."""
        keep = self._keep
        return keep if isinstance(keep, int) else max(1, round(keep * depth))

    def after(self, before: Layout, mixers: dict[str, dict], stay: Sequence[int] | None = None) -> Layout:
        """The layout after the stage, given the layout before it.

        Args:
            mixers: the recipe's. stay: the chosen layers that keep attention; None spreads them evenly.

        Raises:
            ValueError: a letter has no mixer, a layer does not exist or is converted already, or no attention layer is
                left; the message names the key.
        """
        depth = len(before.pattern)
        there = [layer for layer in range(depth) if before.mixer_of(layer) is None]
        if not there:
            raise ValueError("every layer is converted already; no attention layer is left")
        if isinstance(self.pattern, str):
            if len(self.pattern) > depth:
                raise ValueError(f"pattern {self.pattern!r} names {len(self.pattern)} layers, but the model has {depth}")
            return self._layout((self.pattern * depth)[:depth], before, mixers)
        letter = self._letter(mixers)
        if self.layers is not None:
            converted = self._named(self.layers, before, depth)
        else:
            if stay is None:
                stay = self.even(there, depth)
            converted = [layer for layer in there if layer not in stay]
        found = "".join(letter if layer in converted else old for layer, old in enumerate(before.pattern))
        return self._layout(found, before, mixers)

    def even(self, there: Sequence[int], depth: int) -> list[int]:
        """The layers that keep attention, evenly spread over those that have it (`there`).

        Raises:
            ValueError: no layer would be converted.
        """
        count = len(there) // 2 if self.pattern is None else self.kept(depth)
        if count >= len(there):
            raise ValueError(
                f"pattern.keep is {self._keep}, {count} of {depth} layers, and {len(there)} have attention: none "
                "would be converted; keep fewer"
            )
        return [there[index * len(there) // count] for index in range(count)]

    def _letter(self, mixers: dict[str, dict]) -> str:
        if self.mixer is None and len(mixers) > 1:
            raise ValueError(f"mixer is missing: the recipe has mixers {', '.join(sorted(mixers))}; name one for the layers")
        letter = self.mixer or next(iter(mixers))
        if letter not in mixers:
            raise ValueError(f"mixer is {letter!r}, but the recipe's mixers are {', '.join(sorted(mixers))}; name one")
        return letter

    def _named(self, layers: list[int], before: Layout, depth: int) -> list[int]:
        for layer in layers:
            if layer >= depth:
                raise ValueError(f"layers names layer {layer}, and the model has the layers 0 to {depth - 1}")
            if before.mixer_of(layer) is not None:
                raise ValueError(f"layers names layer {layer}, which is converted already ({before.pattern[layer]})")
        return layers

    def _layout(self, pattern: str, before: Layout, mixers: dict[str, dict]) -> Layout:
        used = {letter: mixers[letter] for letter in sorted(set(pattern) & set(mixers))}
        found = Layout.over(len(pattern), pattern, used, before.meta_tokens)
        further(before, found)
        return found


def later_letters(recipe: Recipe) -> set[str]:
    """The letters that later stages give to layers which have attention in the first layout."""
    found = [cast(Further, entry.options).letters(recipe.mixers) for entry in stages_of(recipe) if entry.kind.changes_layout]
    return set().union(*found)


def first_layout(recipe: Recipe, layers: int, where: str) -> Layout:
    """The layout that a recipe's student begins with; the recipe's pattern must be letters.

    Raises:
        UserError: `Layout.over` refuses the layout; the message names `where`.
    """
    spare = later_letters(recipe) - set(recipe.pattern)
    mixers = {letter: options for letter, options in recipe.mixers.items() if letter not in spare}
    return layout_of(cast(str, recipe.pattern), mixers, layers, where, recipe.meta_tokens)


def layouts_of(recipe: Recipe, first: Layout, where: str) -> list[Layout]:
    """The layout of each stage of a recipe; for a stage that converts layers, the layout after it.

    Raises:
        UserError: layers cannot be converted; the message names the stage and the key.
    """
    found, now = [], first
    for entry in stages_of(recipe):
        if entry.kind.changes_layout:
            now = layout_after(recipe, entry, now, where)
        found.append(now)
    return found


def layout_after(recipe: Recipe, entry: StageEntry, before: Layout, where: str, stay: Sequence[int] | None = None) -> Layout:
    """The layout after a stage. stay: see `Further.after`.

    Raises:
        UserError: naming the stage and the key.
    """
    try:
        return cast(Further, entry.options).after(before, recipe.mixers, stay)
    except ValueError as error:
        raise UserError(f"{where}: {key_of(recipe, entry)}: {error}") from error


def layout_saved(recipe: Recipe, pattern: str, before: Layout, where: str) -> Layout:
    """The layout of a pattern that a checkpoint or run folder holds, from the end of a stage.

    Raises:
        UserError: no stage of the recipe can have made it.
    """
    try:
        letters = sorted(letter for letter in set(pattern) if letter != KEEP or letter in recipe.mixers)
        used = {letter: recipe.mixers[letter] for letter in letters}
        found = Layout.over(len(pattern), pattern, used, before.meta_tokens)
        further(before, found)
    except (KeyError, ValueError) as error:
        raise UserError(f"{where}: no stage of this recipe makes the layout {pattern!r} ({error})") from error
    return found


def students_of(recipe: Recipe, teacher: Teacher, first: Layout, where: str) -> list[Student]:
    """The student of each stage of a recipe, without weights; stages with the same layout share one object.

    Raises:
        UserError: see `layouts_of`; also where a mixer refuses its options.
    """
    now, layout, found = empty(teacher, first), first, []
    for after in layouts_of(recipe, first, where):
        if after != layout:
            now, new = empty(teacher, after), further(layout, after)
            now.newest, layout = new, after
        found.append(now)
    return found
