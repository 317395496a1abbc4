"""Shapes that tests and benchmarks of `linear_kl` run on."""

from typing import NamedTuple


class Case(NamedTuple):
    """Tokens, vocabulary, student width, teacher width."""

    t: int
    v: int
    d: int
    e: int


TEST = [Case(1, 7, 4, 4), Case(63, 11, 8, 6), Case(1030, 5, 4, 4)]
BENCH = [Case(8192, 128256, 2048, 2048)]
