"""Selection of retrieval heads: single heads are ablated on key-value retrieval, and the best stay attention.

Source: arXiv 2602.11374.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal, cast

from pydantic import Field

from distill.errors import UserError
from distill.recipe import Recipe
from distill.selection.measurer import TEACHER, Measurer
from distill.selection.options import Options, rest_of
from distill.selection.scorer import Choice, Ranked, Scorer, check_protected
from distill.selection.switched import SwitchedHeads
from students.skeleton import Student


class HeadOptions(Options):
    """Options of retrieval heads. `keep` is the number or share of heads outside the protected layers, which stay whole."""

    ablate: Literal["zero", "window"] = "zero"
    """What a head that is switched off does: `zero` sets its output to zero, as the paper does; `window` lets it see
    `window` tokens and `sinks`, so that heads which only look nearby are not taken for retrieval heads."""
    families: Annotated[list[str], Field(min_length=1)] = ["key_value"]
    """Families of synthetic recall texts. Tables of the student mark these families as in-sample, although the tables use
    other words."""


class RetrievalHeads(Scorer):
    """Keeps single heads that recall needs (arXiv 2602.11374): score = recall lost when only this head is switched off."""

    Options = HeadOptions
    measures = ("recall",)
    teacher_alone = "it chooses single heads of a teacher, and a stage converts whole layers"

    @classmethod
    def check(cls, recipe: Recipe, options: HeadOptions, where: str) -> None:
        letters = rest_of(recipe, options)
        mixer = recipe.mixers[letters[0]]
        if len(letters) > 1 or mixer.get("mixer") != "split_heads":
            raise UserError(
                f"{where}.by is 'retrieval-heads', which chooses heads: the other layers need one letter whose mixer is "
                f"split_heads, not {letters!r} ({mixer.get('mixer')})"
            )
        if options.periodic:
            raise UserError(f"{where}.periodic keeps whole layers, and retrieval-heads chooses single heads; leave it out")
        if "keep" in mixer:
            raise UserError(f"mixers.{letters}.keep is what {where} selects; leave it out")

    @classmethod
    def passes(cls, options: HeadOptions, layers: int, heads: int) -> int:
        return (layers - len(options.protect)) * heads

    def rank(self, measurer: Measurer) -> list[Ranked]:
        switched = self._switched(measurer, windows=measurer.options.ablate == "window")
        whole = self.measure(measurer, None, self.measures)
        candidates = _candidates(measurer.options, measurer.layers, measurer.heads)

        def without(layer: int, head: int) -> Student:
            return switched.keep({layer: [other for other in range(measurer.heads) if other != head]})

        models = {f"head {layer}.{head}": partial(without, layer, head) for layer, head in candidates}
        measured, ranking = measurer.measure_all(models, self.measures), []
        for layer, head in candidates:
            found = measured[f"head {layer}.{head}"]
            lost = whole["choice"] - found["choice"]
            ranking.append(Ranked(layer, lost, {"recall lost": lost, "recalled": found["recalled"]}, head))
        return sorted(ranking, key=lambda one: (-cast(float, one.score), one.layer, one.head))

    @classmethod
    def choose(cls, options: HeadOptions, ranking: Sequence[Ranked], layers: int, heads: int) -> Choice:
        count = _count(options, layers, heads)
        return _choice(options, [(one.layer, cast(int, one.head)) for one in ranking][:count], heads)

    @classmethod
    def even(cls, options: HeadOptions, layers: int, heads: int) -> Choice:
        every, count = _candidates(options, layers, heads), _count(options, layers, heads)
        return _choice(options, [every[index * len(every) // count] for index in range(count)], heads)

    def measure(self, measurer: Measurer, choice: Choice | None, measures: Sequence[str]) -> dict[str, float]:
        """Numbers of a choice. Heads that are not kept have windows, whatever `ablate` is, as they have in a student."""
        switched = self._switched(measurer, windows=True)
        if choice is None:
            return measurer.measure(TEACHER, lambda: switched.keep({}), measures)
        chosen = choice.heads or {}
        kept = {layer: chosen.get(layer, []) for layer in range(measurer.layers) if layer not in choice.layers}
        names = [f"{layer}.{head}" for layer, heads in sorted(kept.items()) for head in heads]
        return measurer.measure(f"kept {choice.layers} {' '.join(names)}", lambda: switched.keep(kept), measures)

    def _switched(self, measurer: Measurer, windows: bool) -> SwitchedHeads:
        """The model with head switches, made once with windows and once without."""
        made = self.__dict__.setdefault("_made", {})
        if windows not in made:
            made[windows] = SwitchedHeads(measurer.session.teacher, measurer.options, windows)
        return made[windows]


def _candidates(options: HeadOptions, layers: int, heads: int) -> list[tuple[int, int]]:
    """Every head outside the protected layers, as (layer, number)."""
    check_protected(options, layers)
    return [(layer, head) for layer in range(layers) if layer not in options.protect for head in range(heads)]


def _count(options: HeadOptions, layers: int, heads: int) -> int:
    every = len(_candidates(options, layers, heads))
    count = options.keep if isinstance(options.keep, int) else max(1, round(options.keep * every))
    if count >= every:
        raise UserError(
            f"pattern.keep is {options.keep}, but there are {every} heads outside the protected layers; keep fewer"
        )
    return count


def _choice(options: HeadOptions, kept: Sequence[tuple[int, int]], heads: int) -> Choice:
    """The chosen heads by layer; a layer whose heads are all chosen keeps its whole attention."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted(kept):
        by_layer.setdefault(layer, []).append(head)
    whole = [layer for layer, chosen in by_layer.items() if len(chosen) == heads]
    single = {layer: chosen for layer, chosen in by_layer.items() if layer not in whole}
    return Choice(sorted({*options.protect, *whole}), single)
