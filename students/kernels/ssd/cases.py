"""Shapes and random inputs for tests and benchmarks of `ssd`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from students.kernels.documents import random_documents
from students.kernels.op import Op, Work
from students.kernels.ssd import reference_ssd, reference_step

SQUARE = 64  # chunk length for which the FLOP of the scan are counted


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
    """Draw random inputs by name: those that have a gradient, and the others."""
    b, t, h, g, p, n = case[:6]
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    leaves = {
        "x": torch.randn(b, t, h, p, **options),
        "log_a": -torch.rand(b, t, h, device=device),
        "B": torch.randn(b, t, g, n, **options) * n**-0.5,
        "C": torch.randn(b, t, g, n, **options),
        "initial_state": torch.randn(b, h, p, n, device=device),
    }
    return leaves, {"documents": random_documents(b, t, device) if case.packed else None}


def draw_step(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Draw random inputs of the one-token kernel; none of them has a gradient."""
    leaves, _ = draw(case, dtype, device)
    state = leaves.pop("initial_state")
    return {}, {name: part[:, 0] for name, part in leaves.items()} | {"state": state}


def _work(case: Case) -> Work:
    tokens, (h, g, p, n) = case.b * case.t, case[2:6]
    forward = (tokens * (4 * h * p + 4 * g * n + 4 * h), tokens * (g * SQUARE * n + h * (SQUARE * p + 4 * n * p)))
    back = (tokens * (6 * h * p + 8 * g * n + 8 * h), tokens * (3 * g * SQUARE * n + h * (2 * SQUARE * p + 10 * n * p)))
    return Work(forward, (forward[0] + back[0], forward[1] + back[1]))


def _step_work(case: Case) -> Work:
    size = 2.0 * 4 * case.b * case.h * case.p * case.n
    return Work((size, 5.0 * case.b * case.h * case.p * case.n), (size, 0.0))


OPS = {
    "ssd": Op(
        BENCH,
        draw,
        reference_ssd,
        "students.kernels.ssd.kernel:ssd",
        _work,
        choices=lambda kernel, case, dtype: kernel.configs(dtype, case.n, case.p),
        without=("initial_state",),
        place=10,
    ),
    "ssd_step": Op(
        BENCH_STEP,
        draw_step,
        reference_step,
        "students.kernels.ssd.kernel:ssd_step",
        _step_work,
        small=lambda case: case._replace(b=2),
        backward=False,
        place=10,
    ),
}
