"""The base class of scorers, which rank layers or heads by measurements and say in advance how many they need."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from distill.errors import UserError
from distill.recipe import Recipe, Selected
from distill.selection.measurer import Measurer
from distill.selection.options import Options as Common


@dataclass(frozen=True)
class Ranked:
    """A layer or head with its score and the numbers that the score is made from. A higher score is better to keep."""

    layer: int
    score: float | None
    numbers: dict[str, float] = field(default_factory=dict)
    head: int | None = None

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"{self.layer}" if self.head is None else f"{self.layer}.{self.head}"


@dataclass(frozen=True)
class Choice:
    """The choice of what stays attention: whole layers, and single heads by layer in a selection of heads."""

    layers: list[int]
    heads: dict[int, list[int]] | None = None


class Scorer:
    """Base class of scorers. By default they rank whole layers."""

    Options: ClassVar[type[Common]] = Common
    measures: ClassVar[tuple[str, ...]] = ()  # of each measured model
    note: ClassVar[str] = ""  # a caveat that is printed with its ranking
    teacher_alone: ClassVar[str] = ""  # why it cannot choose layers of a student that has mixers; empty if it can

    @classmethod
    def check(cls, recipe: Recipe, options: Any, where: str) -> None:
        """Refuse a recipe that does not fit this scorer.

        Raises:
            UserError: naming the key.
        """

    @classmethod
    def passes(cls, options: Any, layers: int, heads: int) -> int:
        """The number of models that it measures for a teacher with `layers` layers of `heads` heads."""
        return 0

    @classmethod
    def reads(cls, options: Any) -> tuple[str, ...]:
        """The measures that are taken of each model."""
        return cls.measures

    @classmethod
    def trains_on(cls, options: Any) -> int:
        """The number of tokens that it trains on."""
        return 0

    @classmethod
    def selected_by(cls, options: Any) -> Selected:
        """The recall families and tasks that its choice is based on, which tables mark as in-sample."""
        reads = cls.reads(options)
        families = options.families if "recall" in reads else []
        return Selected(by=options.by, families=families, tasks=options.names if "task" in reads else [])

    def rank(self, measurer: Measurer) -> list[Ranked]:
        """Rank the layers, the best to keep first. Protected layers are always kept and left out here."""
        raise NotImplementedError

    @classmethod
    def choose(cls, options: Any, ranking: Sequence[Ranked], layers: int, heads: int) -> Choice:
        """The choice from a ranking, for a teacher with `layers` layers of `heads` heads."""
        best = [one.layer for one in ranking if one.layer not in options.protect]
        return Choice(sorted([*options.protect, *best][: count_of(options, layers)]))

    def worth(
        self, measurer: Measurer, ranking: Sequence[Ranked], layouts: Sequence[tuple[int, ...]]
    ) -> dict[tuple[int, ...], float] | None:
        """The score of each layout, by its kept layers: the sum of their scores. None if layers have no scores."""
        scores = {one.layer: one.score for one in ranking}
        if not scores or None in scores.values():
            return None
        return {kept: sum(cast(float, scores[layer]) for layer in kept) for kept in layouts}

    @classmethod
    def even(cls, options: Any, layers: int, heads: int) -> Choice:
        """An evenly spread choice of the same size: the baseline of the choice, and its substitute in plans."""
        if options.periodic:
            return Choice(every_nth(intervals(options, layers)[0], layers))
        return Choice(evenly(count_of(options, layers), layers, options.protect))

    def measure(self, measurer: Measurer, choice: Choice | None, measures: Sequence[str]) -> dict[str, float]:
        """Numbers of the untrained model with this choice; None for the teacher."""
        return measurer.layout(range(measurer.layers) if choice is None else choice.layers, measures)


def count_of(options: Common, layers: int) -> int:
    """The number of layers that keep attention in a model of `layers` layers.

    Raises:
        UserError: `keep` is all of them, or fewer than are protected; or a protected layer does not exist.
    """
    check_protected(options, layers)
    kept = options.keep if isinstance(options.keep, int) else max(1, round(options.keep * layers))
    if kept >= layers:
        raise UserError(f"pattern.keep is {options.keep}, which leaves none of {layers} layers to convert; keep fewer")
    if kept < len(options.protect):
        raise UserError(
            f"pattern.keep is {options.keep}, {kept} of {layers} layers, but {len(options.protect)} are protected "
            f"({options.protect}); keep more, or set pattern.protect"
        )
    return kept


def every_nth(every: int, layers: int) -> list[int]:
    """The layers i with (i + 1) % every = 0."""
    return list(range(every - 1, layers, every))


def intervals(options: Common, layers: int) -> list[int]:
    """All intervals n for which every n-th layer gives the number of kept layers, the one nearest to an even spread first.

    Raises:
        UserError: there is no such interval.
    """
    count = count_of(options, layers)
    found = [every for every in range(2, layers + 1) if layers // every == count]
    if not found:
        known = sorted({layers // every for every in range(2, layers + 1)}, reverse=True)
        raise UserError(
            f"pattern.keep is {options.keep}, {count} of {layers} layers, but with periodic: true every n-th layer stays, "
            f"and no interval keeps {count}; keep {', '.join(map(str, known))}"
        )
    return sorted(found, key=lambda every: abs(every - layers / count))


def check_protected(options: Common, layers: int) -> None:
    """Refuse protected layers that do not exist or are named twice.

    Raises:
        UserError: naming the layer.
    """
    for layer in options.protect:
        if layer >= layers or options.protect.count(layer) > 1:
            reason = f"the layers are 0 to {layers - 1}" if layer >= layers else "it is named twice"
            raise UserError(f"pattern.protect names layer {layer}; {reason}")


def evenly(count: int, layers: int, protect: Sequence[int] = ()) -> list[int]:
    """`count` layers, evenly spread from layer 0. A protected layer replaces the nearest unprotected one."""
    kept = [index * layers // count for index in range(count)] if count else []
    for layer in protect:
        if layer not in kept:
            movable = [other for other in kept if other not in protect]
            kept[kept.index(min(movable, key=lambda other: abs(other - layer)))] = layer
    return sorted(kept)
