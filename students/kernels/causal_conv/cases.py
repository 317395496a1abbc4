"""Shapes that tests and benchmarks of `causal_conv` run on."""

from typing import NamedTuple


class Case(NamedTuple):
    """Batch, time, channels, filter width, activation, and whether documents are packed."""

    b: int
    t: int
    c: int
    w: int
    activation: str | None
    packed: bool


TEST = [
    Case(1, 1, 3, 4, None, False),
    Case(2, 63, 8, 4, "silu", False),
    Case(2, 64, 5, 2, "silu", True),
    Case(1, 200, 7, 3, None, True),
]
BENCH = [Case(8, 2048, 2304, 4, "silu", False), Case(2, 16384, 2304, 4, "silu", False)]
