"""Shapes and random inputs for tests and benchmarks of `selective_scan`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from students.kernels.documents import random_documents
from students.kernels.op import Op, Work
from students.kernels.selective_scan import reference_scan, reference_step


class Case(NamedTuple):
    """Batch, time, channels, groups, states a channel, and whether documents are packed."""

    b: int
    t: int
    d: int
    g: int
    n: int
    packed: bool


TEST = [
    Case(1, 1, 3, 1, 4, False),
    Case(2, 63, 8, 2, 4, False),
    Case(2, 64, 6, 6, 3, True),
    Case(1, 200, 6, 3, 5, True),
]
BENCH = [
    Case(8, 2048, 2048, 1, 16, False),
    Case(8, 2048, 2048, 1, 64, False),
    Case(2, 16384, 2048, 1, 16, False),
    Case(1, 65536, 2048, 1, 16, False),
]
BENCH_STEP = [Case(256, 1, 2048, 1, 16, False), Case(256, 1, 2048, 1, 64, False)]


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Draw random inputs by name, dt and A in Mamba's initial ranges: those that have a gradient, and the others."""
    b, t, d, g, n = case[:5]
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    leaves = {
        "x": torch.randn(b, t, d, **options),
        "dt": torch.rand(b, t, d, **options) * 0.2,
        "A": -torch.arange(1.0, n + 1, device=device).repeat(d, 1) * (0.5 + torch.rand(d, n, device=device)),
        "B": torch.randn(b, t, g, n, **options),
        "C": torch.randn(b, t, g, n, **options) * n**-0.5,
        "initial_state": torch.randn(b, d, n, device=device),
    }
    return leaves, {"documents": random_documents(b, t, device) if case.packed else None}


def draw_step(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Draw random inputs of the one-token kernel; none of them has a gradient."""
    leaves, _ = draw(case, dtype, device)
    state, A = leaves.pop("initial_state"), leaves.pop("A")
    return {}, {name: part[:, 0] for name, part in leaves.items()} | {"A": A, "state": state}


def _work(case: Case) -> Work:
    """Bytes and FLOP do not limit this op; its b t d n exponentials do.

    A multiprocessor computes 16 exponentials per clock; an H100 computes 3.7e12 per second.
    """
    tokens, rows = float(case.b * case.t), 2.0 * case.g * case.n
    states = tokens * case.d * case.n
    forward, back = tokens * 2 * (3 * case.d + rows), tokens * 2 * (5 * case.d + 2 * rows)
    return Work((forward, 6 * states), (forward + back, 24 * states))


def _step_work(case: Case) -> Work:
    states = float(case.b * case.d * case.n)
    size = 2 * 4 * states + 4.0 * case.d * case.n + 2.0 * case.b * (3 * case.d + 2 * case.g * case.n)
    return Work((size, 6 * states), (0.0, 0.0))


OPS = {
    "selective_scan": Op(
        BENCH,
        draw,
        reference_scan,
        "students.kernels.selective_scan.kernel:selective_scan",
        _work,
        choices=lambda kernel, case, dtype: kernel.configs(case.n),
        without=("initial_state",),
        place=40,
    ),
    "selective_scan_step": Op(
        BENCH_STEP,
        draw_step,
        reference_step,
        "students.kernels.selective_scan.step:selective_scan_step",
        _step_work,
        small=lambda case: case._replace(b=2),
        backward=False,
        place=40,
    ),
}
