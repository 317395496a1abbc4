"""Shapes and random inputs for tests and benchmarks of `selective_token`."""

from typing import NamedTuple

import torch

from students.kernels.op import Op, Work
from students.kernels.selective_token import reference_token


class Case(NamedTuple):
    """Batch, channels, groups of B and C, states."""

    b: int
    d: int
    g: int
    n: int


TEST = [Case(1, 24, 1, 16), Case(2, 18, 3, 5)]
BENCH = [Case(1, 2048, 1, 16), Case(256, 2048, 1, 16), Case(8, 1536, 4, 64)]
GPU = [*TEST, *BENCH]


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[dict, dict]:
    """Draw random arguments without gradients: x, dt and z in the types of earlier kernels' outputs, a float32 state."""

    def random(*shape, kind=torch.float32):
        return torch.randn(shape, device=device).to(kind)

    b, d, g, n = case
    groups = {name: random(b, g, n, kind=dtype) for name in ("B", "C")}
    rows = {"x": random(b, d), "dt": random(b, d), "z": random(b, 2 * d, kind=dtype)[:, d:]}
    more = {"A_log": random(d, n) / 2, "D": random(d), "state": random(b, d, n), "dtype": torch.float32}
    return {}, rows | groups | more


def _work(case: Case) -> Work:
    """The state is read and written once."""
    states = case.b * case.d * case.n
    return Work((8.0 * states, 6.0 * states), (8.0 * states, 0.0))


OPS = {
    "selective_token": Op(
        BENCH,
        draw,
        reference_token,
        "students.kernels.selective_token.kernel:selective_token",
        _work,
        small=lambda case: case._replace(b=min(case.b, 2), d=min(case.d, 48)),
        backward=False,
        place=70,
    )
}
