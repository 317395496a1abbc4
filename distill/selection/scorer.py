"""What a scorer is: it ranks layers or heads by measurements, and says beforehand how many it needs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from distill.errors import UserError
from distill.recipe import Recipe, Selected
from distill.selection.measurer import Measurer
from distill.selection.options import Options as Common


@dataclass(frozen=True)
class Ranked:
    """A layer, or a head of it, with its score (higher: more worth keeping) and the numbers behind it."""

    layer: int
    score: float | None
    numbers: dict[str, float] = field(default_factory=dict)
    head: int | None = None

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.layer}" if self.head is None else f"{self.layer}.{self.head}"


@dataclass(frozen=True)
class Choice:
    """What stays attention: whole layers, and, of a selection by heads, single heads by layer."""

    layers: list[int]
    heads: dict[int, list[int]] | None = None


class Scorer:
    """Base of the scorers. They rank whole layers unless they say otherwise."""

    Options: ClassVar[type[Common]] = Common
    measures: ClassVar[tuple[str, ...]] = ()  # of each pass
    note: ClassVar[str] = ""  # what a reader of its ranking should know
    teacher_alone: ClassVar[str] = ""  # why it cannot choose among the layers of a student that has mixers; empty if it can

    @classmethod
    def check(cls, recipe: Recipe, options: Any, where: str) -> None:
        """Refuse a recipe that this scorer cannot serve.

        Raises:
            UserError: naming the key.
        """

    @classmethod
    def passes(cls, options: Any, layers: int, heads: int) -> int:
        """How many models it measures in a teacher of so many layers and heads a layer."""
        return 0

    @classmethod
    def reads(cls, options: Any) -> tuple[str, ...]:
        """The measures of each pass."""
        return cls.measures

    @classmethod
    def trains_on(cls, options: Any) -> int:
        """How many tokens it trains on."""
        return 0

    @classmethod
    def selected_by(cls, options: Any) -> Selected:
        """What its choice rests on, so that tables mark it."""
        reads = cls.reads(options)
        families = options.families if "recall" in reads else []
        return Selected(by=options.by, families=families, tasks=options.names if "task" in reads else [])

    def rank(self, measurer: Measurer) -> list[Ranked]:
        """Every layer that may be kept, the most worth keeping first; protected layers are kept anyway, and left out."""
        raise NotImplementedError

    @classmethod
    def choose(cls, options: Any, ranking: Sequence[Ranked], layers: int, heads: int) -> Choice:
        """What stays in a teacher of so many layers and heads a layer, from the ranking."""
        best = [one.layer for one in ranking if one.layer not in options.protect]
        return Choice(sorted([*options.protect, *best][: count_of(options, layers)]))

    def worth(
        self, measurer: Measurer, ranking: Sequence[Ranked], layouts: Sequence[tuple[int, ...]]
    ) -> dict[tuple[int, ...], float] | None:
        """The score of each layout, by the layers kept: the sum of its layers' scores; None where layers have none."""
        scores = {one.layer: one.score for one in ranking}
        if not scores or None in scores.values():
            return None
        return {kept: sum(cast(float, scores[layer]) for layer in kept) for kept in layouts}

    @classmethod
    def even(cls, options: Any, layers: int, heads: int) -> Choice:
        """As much kept, evenly spread: what a choice is compared with, and planned with before it is made."""
        if options.periodic:
            return Choice(every_nth(intervals(options, layers)[0], layers))
        return Choice(evenly(count_of(options, layers), layers, options.protect))

    def measure(self, measurer: Measurer, choice: Choice | None, measures: Sequence[str]) -> dict[str, float]:
        """Numbers of the untrained model with this choice; None for the teacher."""
        return measurer.layout(range(measurer.layers) if choice is None else choice.layers, measures)


def count_of(options: Common, layers: int) -> int:
    """How many layers stay attention in a model of so many.

    Raises:
        UserError: all of them, or fewer than are protected, or a protected layer that is not there.
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
    """Those with (i + 1) % n = 0."""
    return list(range(every - 1, layers, every))


def intervals(options: Common, layers: int) -> list[int]:
    """Every n of which every n-th layer comes to as many as stay attention, the one nearest to their even spread first.

    Raises:
        UserError: there is none.
    """
    count = count_of(options, layers)
    found = [every for every in range(2, layers + 1) if layers // every == count]
    if not found:
        known = sorted({layers // every for every in range(2, layers + 1)}, reverse=True)
        raise UserError(
            f"pattern.keep is {options.keep}, {count} of {layers} layers, and no interval keeps as many: with periodic: "
            f"true every n-th layer stays, which can be {', '.join(map(str, known))} of them"
        )
    return sorted(found, key=lambda every: abs(every - layers / count))


def check_protected(options: Common, layers: int) -> None:
    """Refuse protected layers that are not there or stand twice.

    Raises:
        UserError: naming the layer.
    """
    for layer in options.protect:
        if layer >= layers or options.protect.count(layer) > 1:
            reason = f"the layers are 0 to {layers - 1}" if layer >= layers else "it stands twice"
            raise UserError(f"pattern.protect names layer {layer}; {reason}")


def evenly(count: int, layers: int, protect: Sequence[int] = ()) -> list[int]:
    """So many layers evenly spread, the first among them; a protected layer takes the place of the nearest that is not."""
    kept = [index * layers // count for index in range(count)] if count else []
    for layer in protect:
        if layer not in kept:
            movable = [other for other in kept if other not in protect]
            kept[kept.index(min(movable, key=lambda other: abs(other - layer)))] = layer
    return sorted(kept)
