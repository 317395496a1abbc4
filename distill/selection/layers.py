"""Scorers of whole layers: evenly spread, or by the effect of replacing one layer at a time by its stand-in.

recall   HALO (arXiv 2601.22156): the loss of recall relative to the other costs of the replacement
kl       the KL divergence of the next-token distribution
task     the loss of log-probability of the right answers of task items
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
    """Keeps evenly spread layers; only the resulting layout is measured."""

    def rank(self, measurer: Measurer) -> list[Ranked]:
        kept = evenly(count_of(measurer.options, measurer.layers), measurer.layers, measurer.options.protect)
        return [Ranked(layer, None) for layer in kept]


class Swap(Scorer):
    """Base class of scorers that replace the attention of one layer at a time and keep all others."""

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
        """Further numbers that are shown with a score."""
        raise NotImplementedError


class RecallScorer(Swap):
    """Keeps the layers that recall needs most (HALO, arXiv 2601.22156): score = recall lost / (KL + mean KL of all layers).

    HALO divides the loss of recall by the loss of common sense, so that layers are kept for recall first. Here KL stands for
    common sense. Its mean in the denominator keeps a layer without any effect from a high score by noise.
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
    """Keeps the layers whose replacement changes the next-token distribution most: score = KL."""

    measures = ("kl",)
    note = "KL on plain text understates a layer's value for recall; compare with by: recall, or evaluate both layouts"

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
    """Keeps the layers that task items need: score = loss of log-probability of the right answers, mean over tasks."""

    Options = TaskOptions
    measures = ("task",)

    def scores(self, whole: Mapping[str, float], found: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
        return {layer: whole["right"] - numbers["right"] for layer, numbers in found.items()}

    def numbers(self, whole: Mapping[str, float], without: Mapping[str, float]) -> dict[str, float]:
        return {"right lost": whole["right"] - without["right"], "accuracy": without["accuracy"]}
