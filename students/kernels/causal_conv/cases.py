"""Shapes and random inputs for tests and benchmarks of `causal_conv`."""

from typing import NamedTuple

import torch
from torch import Tensor

from students.kernels.causal_conv import reference_conv
from students.kernels.documents import random_documents
from students.kernels.op import Op, Work


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
BENCH = [
    Case(8, 2048, 2304, 4, "silu", False),
    Case(2, 16384, 2304, 4, "silu", False),
    Case(1, 65536, 2304, 4, "silu", False),
]


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Draw random inputs by name: those that have a gradient, and the others."""
    leaves = {
        "x": torch.randn(case.b, case.t, case.c, dtype=dtype, device=device),
        "weight": torch.randn(case.c, case.w, device=device),
        "bias": torch.randn(case.c, device=device),
        "initial": torch.randn(case.b, case.w - 1, case.c, dtype=dtype, device=device),
    }
    documents = random_documents(case.b, case.t, device) if case.packed else None
    return leaves, {"activation": case.activation, "documents": documents}


def _work(case: Case) -> Work:
    stream = 2.0 * case.b * case.t * case.c
    return Work((2 * stream, stream * case.w), (5 * stream, 4 * stream * case.w))


OPS = {
    "causal_conv": Op(
        BENCH,
        draw,
        reference_conv,
        "students.kernels.causal_conv.kernel:causal_conv",
        _work,
        choices=lambda kernel, case, dtype: kernel.CONFIGS,
        without=("initial",),
        place=20,
    )
}
