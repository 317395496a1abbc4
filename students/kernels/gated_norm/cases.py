"""Shapes and random inputs for tests and benchmarks of `gated_norm`."""

from typing import NamedTuple

import torch
from torch import Tensor

from students.kernels.gated_norm import reference_norm
from students.kernels.op import Op, Work


class Case(NamedTuple):
    """Batch, time, channels, groups."""

    b: int
    t: int
    c: int
    g: int


TEST = [Case(1, 1, 4, 1), Case(2, 63, 24, 3), Case(1, 200, 20, 1), Case(3, 17, 96, 6)]
BENCH = [Case(8, 2048, 4096, 32), Case(8, 2048, 4096, 1)]


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Draw random inputs by name: those that have a gradient, and the others."""
    shape = (case.b, case.t, case.c)
    leaves = {name: torch.randn(shape, dtype=dtype, device=device) for name in ("y", "z")}
    return leaves | {"weight": torch.randn(case.c, device=device)}, {"groups": case.g, "eps": 1e-5}


def _work(case: Case) -> Work:
    stream = 2.0 * case.b * case.t * case.c
    return Work((3 * stream, 5 * stream), (8 * stream, 15 * stream))


OPS = {
    "gated_norm": Op(
        BENCH,
        draw,
        reference_norm,
        "students.kernels.gated_norm.kernel:gated_norm",
        _work,
        choices=lambda kernel, case, dtype: kernel.CONFIGS,
        place=60,
    )
}
