"""Shapes and random inputs for tests and benchmarks of `token_linear`."""

from typing import Any, NamedTuple

import torch

from students.kernels.op import Op, Work, called, flat
from students.kernels.token_linear import Rows, reference_linear


class Case(NamedTuple):
    """Batch, width of the input, heights of the sets of rows, options, and the sizes of further products.

    wide: rows of one more set in float32. also: width of a second input, which has rows of its own.
    """

    b: int
    width: int
    rows: tuple[int, ...]
    biased: bool = False
    norm: bool = False
    residual: bool = False
    swiglu: bool = False
    wide: int = 0
    also: int = 0


TEST = [
    Case(1, 32, (24, 8, 8), biased=True, norm=True, wide=4),
    Case(1, 40, (36,), residual=True),
    Case(1, 32, (20,), residual=True, also=24),
    Case(1, 32, (48, 48), norm=True, swiglu=True),
    Case(3, 32, (24, 7), norm=True, wide=3),
    Case(2, 72, (33, 33), norm=True, swiglu=True),
    Case(5, 48, (32,), biased=True, residual=True),
    Case(3, 32, (20,), also=24),
]
BENCH = [  # Llama-3.2-1B's layers with a discrete Mamba-2 and a window
    Case(1, 2048, (6144, 2048, 2048, 512, 512), norm=True, wide=32, biased=True),
    Case(1, 2048, (2048,), residual=True),
    Case(1, 2048, (2048,), residual=True, also=2048),
    Case(1, 2048, (8192, 8192), norm=True, swiglu=True),
    Case(1, 8192, (2048,), residual=True),
    Case(8, 2048, (6144, 2048), norm=True, wide=32),
    Case(16, 8192, (2048,), residual=True),
]
GPU = [*TEST, *BENCH]


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    """Draw random inputs: x and the rows, and the options."""

    def random(*shape, kind=dtype):
        return torch.randn(shape, device=device).to(kind)

    rows = [
        Rows(random(height, case.width) / case.width**0.5, random(height) if case.biased else None) for height in case.rows
    ]
    if case.wide:
        kind = torch.float32
        rows.append(
            Rows(random(case.wide, case.width, kind=kind) / case.width**0.5, random(case.wide, kind=kind), wide=True)
        )
    norm = (1 + 0.1 * random(case.width), 1e-5) if case.norm else None
    options: dict[str, Any] = {"norm": norm, "swiglu": case.swiglu, "also": None}
    if case.also:
        options["also"] = random(case.b, case.also), Rows(random(case.rows[0], case.also) / case.also**0.5)
    options["residual"] = random(case.b, case.rows[0]) if case.residual else None
    return (3 * random(case.b, case.width), rows), options


def draw_flat(case: Case, dtype: torch.dtype, device: str) -> tuple[dict, dict]:
    """Draw the same for benchmarks; none of the arguments has a gradient."""
    (x, rows), options = draw(case, dtype, device)
    return {}, flat({"x": x, "rows": rows, "dtype": torch.float32} | options)


def _work(case: Case) -> Work:
    """Each weight is read once."""
    weights = case.width * sum(case.rows) + case.also * case.rows[0]
    size = 2.0 * weights + 4.0 * case.width * case.wide
    return Work((size, 2.0 * case.b * weights), (size, 0.0))


OPS = {
    "token_linear": Op(
        BENCH,
        draw_flat,
        reference_linear,
        "students.kernels.token_linear.kernel:token_linear",
        _work,
        small=lambda case: case._replace(width=min(case.width, 96), rows=tuple(min(rows, 64) for rows in case.rows)),
        choices=lambda kernel, case, dtype: kernel.configs(sum(case.rows), case.swiglu),
        call=called,
        backward=False,
        place=70,
    )
}
