"""Shapes and random inputs for tests and benchmarks of `orientation_error`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from students.kernels.documents import random_documents
from students.kernels.matrix_orientation import reference_error
from students.kernels.op import Op, Work


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
BENCH = [
    Case(2, 2048, 32, 8, 64, 64, False, None, 0),
    Case(8, 2048, 32, 8, 64, 64, False, None, 0),
    Case(1, 8192, 32, 8, 128, 128, False, None, 0),
    Case(1, 32768, 8, 8, 64, 64, False, None, 0),
]


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Draw random inputs by name: those that have a gradient, and the others."""
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    leaves = {
        "C": torch.randn(case.b, case.t, case.h, case.n, **options) * case.n**-0.5,
        "B": torch.randn(case.b, case.t, case.h, case.n, **options) * case.n**-0.5,
        "log_a": -torch.rand(case.b, case.t, case.h, device=device),
        "D": torch.randn(case.h, device=device),
    }
    fixed = {
        "q": torch.randn(case.b, case.t, case.h, case.d, **options),
        "k": torch.randn(case.b, case.t, case.kv, case.d, **options),
        "documents": random_documents(case.b, case.t, device) if case.packed else None,
        "scale": case.d**-0.5,
        "softcap": None,
        "window": case.window,
        "min_lag": case.min_lag,
    }
    return leaves, fixed


def _work(case: Case) -> Work:
    squares, rows = float(case.b * case.h * case.t**2), case.b * case.t
    inputs = 2.0 * rows * (case.h * (case.d + 2 * case.n) + case.kv * case.d)
    gradients = 2.0 * rows * case.h * 2 * case.n
    return Work((inputs, squares * (case.d + case.n)), (inputs + gradients, squares * (2 * case.d + 4 * case.n)))


OPS = {
    "matrix_orientation": Op(
        BENCH,
        draw,
        reference_error,
        "students.kernels.matrix_orientation.kernel:orientation_error",
        _work,
        choices=lambda kernel, case, dtype: kernel.configs(dtype, max(case.d, case.n)),
        place=50,
    )
}
