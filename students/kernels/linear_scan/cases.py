"""Shapes and random inputs for tests and benchmarks of `linear_scan`."""

from typing import NamedTuple

import torch
from torch import Tensor

from students.kernels.documents import random_documents
from students.kernels.linear_scan import reference_scan, reference_step
from students.kernels.op import Op, Work


class Case(NamedTuple):
    """Batch, time, channels, and whether documents are packed."""

    b: int
    t: int
    d: int
    packed: bool


TEST = [
    Case(1, 1, 3, False),
    Case(2, 63, 8, False),
    Case(2, 64, 5, True),
    Case(1, 200, 7, True),
]
LONG = Case(2, 2 * 256 + 5, 3, True)  # more than one chunk of the reference
BENCH = [Case(8, 2048, 2048, False), Case(2, 16384, 2048, False), Case(1, 65536, 2048, False)]
BENCH_STEP = [Case(256, 1, 2048, False), Case(256, 1, 8192, False)]


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Draw random inputs by name: those that have a gradient, and the others."""
    b, t, d = case[:3]
    leaves = {
        "x": torch.randn(b, t, d, dtype=dtype, device=device),
        "log_a": -torch.rand(b, t, d, dtype=dtype, device=device),
        "initial_state": torch.randn(b, d, device=device),
    }
    return leaves, {"documents": random_documents(b, t, device) if case.packed else None}


def draw_step(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Draw random inputs of the one-token kernel; none of them has a gradient."""
    leaves, _ = draw(case, dtype, device)
    return {}, {"x": leaves["x"][:, 0], "log_a": leaves["log_a"][:, 0], "state": leaves["initial_state"]}


def _work(case: Case) -> Work:
    cells = float(case.b * case.t * case.d)
    return Work((3 * 2 * cells, 2 * cells), ((3 + 5) * 2 * cells, 6 * cells))


def _step_work(case: Case) -> Work:
    cells = float(case.b * case.d)
    return Work(((3 * 2 + 2 * 4) * cells, 2 * cells), (0.0, 0.0))


def _choices(kernel, case: Case, dtype: torch.dtype) -> list:
    """Returns the kernel's configurations; the default depends on the number of blocks in the case."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        like = torch.empty(case.b, 1, case.d, dtype=dtype)
    return kernel.configs(like, like)


OPS = {
    "linear_scan": Op(
        BENCH,
        draw,
        reference_scan,
        "students.kernels.linear_scan.kernel:linear_scan",
        _work,
        choices=_choices,
        without=("initial_state",),
        place=30,
    ),
    "linear_scan_step": Op(
        BENCH_STEP,
        draw_step,
        reference_step,
        "students.kernels.linear_scan.kernel:linear_scan_step",
        _step_work,
        small=lambda case: case._replace(b=2),
        backward=False,
        place=30,
    ),
}
