"""Training speed of a stage on one GPU: measured points, and interpolation between them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

GPU = "an H100"
NEAR = 1.05  # the largest ratio of parameter counts at which a measured point is taken unchanged


class Point(NamedTuple):
    """A measurement: the teacher's parameters, tokens a second on one GPU with the optimizer step, and the recipe.

    Command: `distill bench steps --recipe RECIPE --no-references`."""

    parameters: float
    tokens: float
    source: str


class Rate(NamedTuple):
    """Tokens a second on one GPU, and the source of the number."""

    tokens: float
    said: str


def rate_of(points: Sequence[Point], parameters: float) -> Rate | None:
    """The training speed of a stage for a teacher with `parameters` parameters; None if the stage was never measured.

    Between two measured sizes, the speed is interpolated in the logarithms of both. Above the largest, arithmetic is the
    bound, so the speed falls in proportion to the parameters. Below the smallest, it is that of the smallest.
    """
    points = sorted(points)
    if not points:
        return None
    nearest = min(points, key=lambda point: abs(math.log(point.parameters / parameters)))
    if max(nearest.parameters / parameters, parameters / nearest.parameters) <= NEAR:
        return Rate(nearest.tokens, f"measured on {GPU}: {nearest.source}")
    below, above = ([p for p in points if (p.parameters < parameters) == smaller] for smaller in (True, False))
    if not below:
        return Rate(points[0].tokens, f"of a larger teacher, measured on {GPU}: {points[0].source}")
    if not above:
        last = points[-1]
        return Rate(last.tokens * last.parameters / parameters, f"extrapolated from {last.parameters / 1e9:.1f}B on {GPU}")
    low, high = below[-1], above[0]
    part = math.log(parameters / low.parameters) / math.log(high.parameters / low.parameters)
    tokens = math.exp((1 - part) * math.log(low.tokens) + part * math.log(high.tokens))
    sizes = f"{low.parameters / 1e9:.2g}B and {high.parameters / 1e9:.2g}B"
    return Rate(tokens, f"interpolated between {sizes}, measured on {GPU}")
