"""Shapes that tests and benchmarks of `ssd` run on."""

from typing import NamedTuple


class Case(NamedTuple):
    """Batch, time, heads, groups, value width, state width, and whether documents are packed."""

    b: int
    t: int
    h: int
    g: int
    p: int
    n: int
    packed: bool


TEST = [
    Case(1, 1, 1, 1, 4, 4, False),
    Case(2, 63, 4, 2, 8, 4, False),
    Case(2, 64, 4, 4, 4, 8, True),
    Case(1, 200, 6, 3, 8, 16, True),
    Case(3, 129, 2, 1, 16, 4, True),
]
LONG = Case(1, 64 * 64 * 2 + 5, 1, 1, 2, 2, True)  # more than one segment of the reference
BENCH = [
    Case(8, 2048, 32, 32, 64, 64, False),
    Case(2, 16384, 32, 32, 64, 64, False),
]
