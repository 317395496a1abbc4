"""Shapes that tests of `attention` run on."""

from typing import NamedTuple


class Case(NamedTuple):
    """Batch, queries, keys, heads, head width, window, sinks, whether documents are packed, soft cap."""

    b: int
    t: int
    s: int
    h: int
    d: int
    window: int | None
    sinks: int
    packed: bool
    softcap: float | None


TEST = [
    Case(1, 1, 1, 1, 4, None, 0, False, None),
    Case(2, 63, 63, 2, 8, None, 0, True, None),
    Case(2, 5, 40, 2, 8, 16, 4, True, None),
    Case(2, 300, 300, 3, 4, 16, 4, True, None),
    Case(1, 257, 257, 2, 4, 100, 2, True, 5.0),
    Case(2, 200, 200, 1, 8, 7, 0, False, None),
    Case(2, 300, 300, 2, 4, 16, 0, True, None),
]
