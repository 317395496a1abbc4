"""Shapes that tests and benchmarks of `ssd` run on, and inputs of these shapes."""

from typing import NamedTuple

import torch
from torch import Tensor

from students.kernels.documents import random_documents


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
    Case(8, 2048, 32, 1, 64, 64, False),
    Case(8, 2048, 32, 32, 64, 128, False),
    Case(2, 16384, 32, 32, 64, 64, False),
    Case(1, 65536, 32, 32, 64, 64, False),
]
BENCH_STEP = [Case(256, 1, 32, 32, 64, 64, False), Case(256, 1, 32, 1, 64, 128, False)]


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Random inputs by name: those that have a gradient, and the others."""
    b, t, h, g, p, n = case[:6]
    options = {"dtype": dtype, "device": device}
    leaves = {
        "x": torch.randn(b, t, h, p, **options),
        "log_a": -torch.rand(b, t, h, device=device),
        "B": torch.randn(b, t, g, n, **options) * n**-0.5,
        "C": torch.randn(b, t, g, n, **options),
        "initial_state": torch.randn(b, h, p, n, device=device),
    }
    return leaves, {"documents": random_documents(b, t, device) if case.packed else None}


def draw_step(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Random inputs of the one-token kernel; none of them has a gradient."""
    leaves, _ = draw(case, dtype, device)
    state = leaves.pop("initial_state")
    return {}, {name: part[:, 0] for name, part in leaves.items()} | {"state": state}
