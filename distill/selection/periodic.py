"""Layouts with attention in every n-th layer alone, where (i + 1) % n = 0: what some engines can run of a hybrid.

MLX and SGLang are told an interval, not which layers (`distill.exporters.containers.qwen35`), so a free choice of layers
does not run there. `periodic: true` takes the best interval of the budget by the scorer's own score, and says what the free
choice would have scored.
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
    """The interval whose layers score highest, and what it costs against a free choice of as many.

    Where a scorer scores nothing (`uniform`), the interval nearest to evenly spread layers.

    Args:
        free: what the ranking keeps where any layer may be.

    Returns:
        the choice, and {every: n, score: of its layers, free: the free choice's layers, free_score}; the scores are None
        where there are none.

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
    """Refuse options that say themselves which layers stay.

    Raises:
        UserError: naming the key.
    """
    if options.periodic and options.protect:
        raise UserError(
            f"{where}.protect names layers {options.protect}, but with periodic: true the interval alone says which layers "
            "stay attention; leave one of them out"
        )


def cost_line(found: dict[str, Any], models: dict[str, Any]) -> str:
    """What an interval costs, in words.

    Args:
        found: as `best_interval` gives it. models: what was measured of the untrained models, `chosen` and `free` with them.
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
