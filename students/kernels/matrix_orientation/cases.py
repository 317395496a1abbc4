"""Shapes that tests and benchmarks of `orientation_error` run on."""

from typing import NamedTuple


class Case(NamedTuple):
    """Batch, time, heads, key heads, head width, state width, packed documents, sliding window, least lag."""

    b: int
    t: int
    h: int
    kv: int
    d: int
    n: int
    packed: bool
    window: int | None
    min_lag: int


TEST = [
    Case(1, 1, 2, 1, 4, 4, False, None, 0),
    Case(2, 63, 4, 2, 8, 4, True, None, 0),
    Case(1, 200, 2, 2, 8, 8, True, 32, 0),
    Case(2, 129, 6, 3, 4, 8, False, None, 16),
]
BENCH = [Case(2, 2048, 32, 8, 64, 64, False, None, 0)]
