"""Greedy selection with a beam: layers are added one at a time to a model of stand-ins, so that they count together.

A layer that is worth nothing alone may be half of a pair (one head writes what another looks up): several layouts are
followed at a time, and each step measures whole layouts, never single layers. As Distill-then-Replace (arXiv 2601.11667)
found, static scores lose to it; it costs layers x kept x beam measurements, fewer with `look_ahead`.
"""

from collections.abc import Sequence
from typing import Literal

from distill.selection.measurer import Measurer
from distill.selection.options import Options, Whole
from distill.selection.scorer import Ranked, Scorer, count_of, intervals


class GreedyOptions(Options):
    """Options of greedy selection."""

    measure: Literal["recall", "kl"] = "recall"
    """What is to be kept."""
    beam: Whole = 2
    """Layouts that are followed at a time."""
    look_ahead: Whole | None = 8
    """How many of the layers that helped most a step earlier are tried again; `null`: all."""


class Greedy(Scorer):
    """Layers added one by one to a model of stand-ins (arXiv 2601.11667): score = what the layer gained in its turn."""

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
        gains: dict[int, float] = {}  # of every layer when it was last tried
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
        """Measured whole, as everything here."""
        return self._values(measurer, list(dict.fromkeys(layouts)))

    def _promising(self, kept: tuple[int, ...], gains: dict[int, float], measurer: Measurer) -> list[int]:
        """The layers to try beside some: in the first step all, then those that helped most when they were last tried."""
        left = [layer for layer in range(measurer.layers) if layer not in kept]
        if not all(layer in gains for layer in left):
            return left
        return sorted(left, key=lambda layer: (-gains[layer], layer))[: measurer.options.look_ahead]

    def _values(self, measurer: Measurer, layouts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        """Of each layout, higher is better: the forced-choice log-probability of recall, or minus the KL."""
        measure = measurer.options.measure
        found = measurer.layouts(layouts, (measure,))
        return {kept: one["choice"] if measure == "recall" else -one["kl"] for kept, one in found.items()}
