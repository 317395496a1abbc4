"""Greedy selection with a beam: attention layers are added one at a time to a model of stand-ins.

Each step measures whole layouts, not single layers, because a layer that is worth nothing alone may be half of a pair (one
head writes what another looks up). Several layouts are followed at a time. In Distill-then-Replace (arXiv 2601.11667) this
beats static scores. It costs layers x kept x beam measurements; `look_ahead` lowers that number.
"""

from collections.abc import Sequence
from typing import Literal

from distill.selection.measurer import Measurer
from distill.selection.options import Options, Whole
from distill.selection.scorer import Ranked, Scorer, count_of, intervals


class GreedyOptions(Options):
    """Options of greedy selection."""

    measure: Literal["recall", "kl"] = "recall"
    """The measure that the selection keeps: recall, or a low KL."""
    beam: Whole = 2
    """Number of layouts that are followed at a time."""
    look_ahead: Whole | None = 8
    """How many layers each step tries: those that gained most when they were last tried. `null`: all."""


class Greedy(Scorer):
    """Adds layers one by one to a model of stand-ins (arXiv 2601.11667): score = the layer's gain when it was added."""

    Options = GreedyOptions

    @classmethod
    def reads(cls, options: GreedyOptions) -> tuple[str, ...]:
        return (options.measure,)

    @classmethod
    def passes(cls, options: GreedyOptions, layers: int, heads: int) -> int:
        start = len(options.protect)
        steps = max(0, count_of(options, layers) - start)
        later = min(layers - start, options.look_ahead or layers)
        periodic = len(intervals(options, layers)) if options.periodic else 0
        return (layers - start if steps else 0) + max(0, steps - 1) * options.beam * later + periodic

    def rank(self, measurer: Measurer) -> list[Ranked]:
        options, start = measurer.options, tuple(sorted(measurer.options.protect))
        order: dict[tuple[int, ...], list[Ranked]] = {start: []}
        beam = self._values(measurer, [start])
        gains: dict[int, float] = {}  # the gain of every layer when it was last tried
        for _ in range(count_of(options, measurer.layers) - len(start)):
            values: dict[tuple[int, ...], float] = {}
            for kept, before in beam.items():
                layers = {tuple(sorted((*kept, layer))): layer for layer in self._promising(kept, gains, measurer)}
                layers = {added: layer for added, layer in layers.items() if added not in values}
                for added, value in self._values(measurer, list(layers)).items():
                    layer, values[added] = layers[added], value
                    gains[layer] = values[added] - before
                    order[added] = [*order[kept], Ranked(layer, gains[layer], {"value": values[added]})]
            best = sorted(values, key=lambda kept: (-values[kept], kept))[: options.beam]
            beam = {kept: values[kept] for kept in best}
        return order[next(iter(beam))]

    def worth(
        self, measurer: Measurer, ranking: Sequence[Ranked], layouts: Sequence[tuple[int, ...]]
    ) -> dict[tuple[int, ...], float] | None:
        """Measured values of whole layouts."""
        return self._values(measurer, list(dict.fromkeys(layouts)))

    def _promising(self, kept: tuple[int, ...], gains: dict[int, float], measurer: Measurer) -> list[int]:
        """The layers to try next to the kept ones: all in the first step, then those that gained most when last tried."""
        left = [layer for layer in range(measurer.layers) if layer not in kept]
        if not all(layer in gains for layer in left):
            return left
        return sorted(left, key=lambda layer: (-gains[layer], layer))[: measurer.options.look_ahead]

    def _values(self, measurer: Measurer, layouts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        """The value of each layout: the forced-choice log-probability of recall, or minus the KL. Higher is better."""
        measure = measurer.options.measure
        found = measurer.layouts(layouts, (measure,))
        return {kept: one["choice"] if measure == "recall" else -one["kl"] for kept, one in found.items()}
