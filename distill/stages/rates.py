"""How fast a stage trained on a GPU where that was measured, and what lies between."""

import math
from collections.abc import Sequence
from typing import NamedTuple

GPU = "an H100"
NEAR = 1.05  # how many times more or fewer parameters are still those of a measured point


class Point(NamedTuple):
    """Parameters of a teacher, tokens a second on one GPU with the optimizer's part, and what was run (`distill bench steps
    --recipe RECIPE --no-references`)."""

    parameters: float
    tokens: float
    source: str


class Rate(NamedTuple):
    """Tokens a second on one GPU, and where that is from."""

    tokens: float
    said: str


def rate_of(points: Sequence[Point], parameters: float) -> Rate | None:
    """How fast a stage trains with a teacher of so many parameters; None where it was never measured.

    Between two measured sizes it is interpolated in the logarithms of both; beyond them arithmetic bounds it, so it falls
    as parameters grow, and is that of the smallest below that.
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
