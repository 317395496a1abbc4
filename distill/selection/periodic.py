"""Periodic layouts: attention in every n-th layer only, where (i + 1) % n = 0, as some engines require of a hybrid.

MLX and SGLang read an interval, not a list of layers (`distill.exporters.containers.qwen35`), so a free choice of layers
does not run there. `periodic: true` takes the interval with the best score that fits the budget, and also reports the score
of the free choice.
"""

from collections.abc import Sequence
from typing import Any

from distill.errors import UserError
from distill.selection.measurer import Measurer
from distill.selection.options import Options
from distill.selection.scorer import Choice, Ranked, Scorer, every_nth, intervals


def best_interval(
    scorer: Scorer, measurer: Measurer, ranking: Sequence[Ranked], free: Choice
) -> tuple[Choice, dict[str, Any]]:
    """The interval whose layers score highest, and its score against that of a free choice of as many layers.

    For a scorer without scores (`uniform`), it is the interval nearest to evenly spread layers.

    Args:
        free: the choice by the ranking without the restriction to intervals.

    Returns:
        the choice, and {every: n, score: of its layers, free: the free choice's layers, free_score}; the scores are None
        for a scorer without scores.

    Raises:
        UserError: no interval keeps as many layers.
    """
    layers = measurer.layers
    candidates = {every: tuple(every_nth(every, layers)) for every in intervals(measurer.options, layers)}
    scores = scorer.worth(measurer, ranking, [*candidates.values(), tuple(free.layers)])
    every = next(iter(candidates)) if scores is None else max(candidates, key=lambda one: scores[candidates[one]])
    score, free_score = (None, None) if scores is None else (scores[candidates[every]], scores[tuple(free.layers)])
    return Choice(list(candidates[every])), {
        "every": every,
        "score": score,
        "free": free.layers,
        "free_score": free_score,
    }


def check_periodic(options: Options, where: str) -> None:
    """Refuse `protect` with `periodic`, since both say which layers keep attention.

    Raises:
        UserError: naming the key.
    """
    if options.periodic and options.protect:
        raise UserError(
            f"{where}.protect names layers {options.protect}, but with periodic: true the interval alone decides which "
            "layers keep attention; leave one of them out"
        )


def cost_line(found: dict[str, Any], models: dict[str, Any]) -> str:
    """A sentence on the cost of an interval against the free choice.

    Args:
        found: from `best_interval`. models: the measurements of the untrained models, including `chosen` and `free`.
    """
    chosen, free = models["chosen"], models["free"]
    layers = ", ".join(map(str, found["free"]))
    said = f"attention in every n-th layer, n = {found['every']}; the free choice is {layers}"
    if found["score"] is not None:
        said += f", which scores {found['free_score']:.4g} where this scores {found['score']:.4g}"
    return (
        f"{said}. Untrained, the interval's held-out KL is {chosen['kl']:.4f} where the free choice's is {free['kl']:.4f}, "
        f"and its recall {chosen['recalled']:.0%} where that is {free['recalled']:.0%}"
    )
