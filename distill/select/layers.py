"""Scorers of whole layers: evenly spread, and one layer at a time replaced by its stand-in.

recall   HALO (arXiv 2601.22156): how much recall falls for what the replacement costs otherwise
kl       how far the next-token distribution moves
task     how much less sure the right answers of task items are
"""

from collections.abc import Mapping

from distill.select.bench import Bench
from distill.select.options import Options, TaskOptions
from distill.select.scorer import Ranked, Scorer, count_of, evenly

TINY = 1e-12


class Uniform(Scorer):
    """Evenly spread; nothing is measured but what comes out."""

    def rank(self, bench: Bench) -> list[Ranked]:
        kept = evenly(count_of(bench.options, bench.layers), bench.layers, bench.options.protect)
        return [Ranked(layer, None) for layer in kept]


class Swap(Scorer):
    """Base: each layer's attention replaced in turn, all others as they are."""

    @classmethod
    def passes(cls, options: Options, layers: int, heads: int) -> int:
        return layers - len(options.protect)

    def rank(self, bench: Bench) -> list[Ranked]:
        every = range(bench.layers)
        whole = bench.layout(every, self.measures)
        found = {}
        for layer in every:
            if layer not in bench.options.protect:
                rest = [other for other in every if other != layer]
                found[layer] = bench.measure(f"layer {layer}", lambda rest=rest: bench.switched.keep(rest), self.measures)
        scores = self.scores(whole, found)
        order = sorted(found, key=lambda layer: (-scores[layer], layer))
        return [Ranked(layer, scores[layer], self.numbers(whole, found[layer])) for layer in order]

    def scores(self, whole: Mapping[str, float], found: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
        """Each layer's score, from the whole model's numbers and those of the models without the layer."""
        raise NotImplementedError

    def numbers(self, whole: Mapping[str, float], without: Mapping[str, float]) -> dict[str, float]:
        """What is shown beside a score."""
        raise NotImplementedError


class Recall(Swap):
    """score = recall lost / (KL + mean KL over the layers).

    HALO divides what recall loses by what common sense loses, so that layers are kept for recall first; here KL stands for
    the latter, and its mean keeps a layer that changes nothing at all from a high score by noise.
    """

    measures = ("recall", "kl")

    def scores(self, whole, found):
        mean = sum(numbers["kl"] for numbers in found.values()) / max(1, len(found))
        return {
            layer: (whole["choice"] - numbers["choice"]) / (numbers["kl"] + mean + TINY) for layer, numbers in found.items()
        }

    def numbers(self, whole, without):
        return {"recall lost": whole["choice"] - without["choice"], "recalled": without["recalled"], "KL": without["kl"]}


class Divergence(Swap):
    """score = KL."""

    measures = ("kl",)
    note = "KL on plain text understates what a layer is worth to recall; compare with by: recall, or judge both layouts"

    def scores(self, whole, found):
        return {layer: numbers["kl"] for layer, numbers in found.items()}

    def numbers(self, whole, without):
        return {"KL": without["kl"]}


class Task(Swap):
    """score = log-probability of the right answers lost, mean over tasks."""

    Options = TaskOptions
    measures = ("task",)

    def scores(self, whole, found):
        return {layer: whole["right"] - numbers["right"] for layer, numbers in found.items()}

    def numbers(self, whole, without):
        return {"right lost": whole["right"] - without["right"], "accuracy": without["accuracy"]}
