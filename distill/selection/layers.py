"""Scorers of whole layers: evenly spread, and one layer at a time replaced by its stand-in.

recall   HALO (arXiv 2601.22156): how much recall falls for what the replacement costs otherwise
kl       how far the next-token distribution moves
task     how much less sure the right answers of task items are
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated

from pydantic import Field, model_validator

from distill.errors import nearest
from distill.evaluation.questions import TASKS
from distill.evaluation.suite import SIX
from distill.selection.measurer import Measurer
from distill.selection.options import Options, Whole
from distill.selection.scorer import Ranked, Scorer, count_of, evenly
from students.skeleton import Student

TINY = 1e-12


class UniformScorer(Scorer):
    """Layers evenly spread; nothing is measured but what comes out."""

    def rank(self, measurer: Measurer) -> list[Ranked]:
        kept = evenly(count_of(measurer.options, measurer.layers), measurer.layers, measurer.options.protect)
        return [Ranked(layer, None) for layer in kept]


class Swap(Scorer):
    """Base: each layer's attention replaced in turn, all others as they are."""

    @classmethod
    def passes(cls, options: Options, layers: int, heads: int) -> int:
        return layers - len(options.protect)

    def rank(self, measurer: Measurer) -> list[Ranked]:
        every = range(measurer.layers)
        whole = measurer.layout(every, self.measures)
        layers = {f"layer {layer}": layer for layer in every if layer not in measurer.options.protect}

        def without(layer: int) -> Student:
            return measurer.switched.keep([other for other in every if other != layer])

        measured = measurer.measure_all({key: partial(without, layer) for key, layer in layers.items()}, self.measures)
        found = {layers[key]: numbers for key, numbers in measured.items()}
        scores = self.scores(whole, found)
        order = sorted(found, key=lambda layer: (-scores[layer], layer))
        return [Ranked(layer, scores[layer], self.numbers(whole, found[layer])) for layer in order]

    def scores(self, whole: Mapping[str, float], found: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
        """Each layer's score, from the whole model's numbers and those of the models without the layer."""
        raise NotImplementedError

    def numbers(self, whole: Mapping[str, float], without: Mapping[str, float]) -> dict[str, float]:
        """What is shown beside a score."""
        raise NotImplementedError


class RecallScorer(Swap):
    """Layers whose loss costs most recall: score = recall lost / (KL + mean KL over the layers) (HALO, arXiv 2601.22156).

    HALO divides what recall loses by what common sense loses, so that layers are kept for recall first; here KL stands for
    the latter, and its mean keeps a layer that changes nothing at all from a high score by noise.
    """

    measures = ("recall", "kl")

    def scores(self, whole: Mapping[str, float], found: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
        mean = sum(numbers["kl"] for numbers in found.values()) / max(1, len(found))
        return {
            layer: (whole["choice"] - numbers["choice"]) / (numbers["kl"] + mean + TINY) for layer, numbers in found.items()
        }

    def numbers(self, whole: Mapping[str, float], without: Mapping[str, float]) -> dict[str, float]:
        return {"recall lost": whole["choice"] - without["choice"], "recalled": without["recalled"], "KL": without["kl"]}


class DivergenceScorer(Swap):
    """Layers whose loss moves the next-token distribution most: score = KL."""

    measures = ("kl",)
    note = "KL on plain text understates what a layer is worth to recall; compare with by: recall, or judge both layouts"

    def scores(self, whole: Mapping[str, float], found: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
        return {layer: numbers["kl"] for layer, numbers in found.items()}

    def numbers(self, whole: Mapping[str, float], without: Mapping[str, float]) -> dict[str, float]:
        return {"KL": without["kl"]}


class TaskOptions(Options):
    """Options of selection by tasks."""

    tasks: str
    """A folder of task files (distill/evaluation/task_files.py)."""
    names: Annotated[list[str], Field(min_length=1)] = list(SIX)
    """Tasks of the folder."""
    items: Whole = 50
    """Items of each task, drawn by the recipe's seed."""

    @model_validator(mode="after")
    def _tasks_exist(self) -> "TaskOptions":
        for name in self.names:
            if name not in TASKS:
                raise ValueError(f"there is no task {name!r}; {nearest(name, TASKS)}")
        return self


class TaskScorer(Swap):
    """Layers that task items need: score = log-probability of the right answers lost, mean over tasks."""

    Options = TaskOptions
    measures = ("task",)

    def scores(self, whole: Mapping[str, float], found: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
        return {layer: whole["right"] - numbers["right"] for layer, numbers in found.items()}

    def numbers(self, whole: Mapping[str, float], without: Mapping[str, float]) -> dict[str, float]:
        return {"right lost": whole["right"] - without["right"], "accuracy": without["accuracy"]}
