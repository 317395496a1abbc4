"""Shapes and random inputs for tests and benchmarks of `lru_token`."""

from typing import NamedTuple

import torch

from students.kernels.lru_token import BlockGate, reference_token
from students.kernels.op import Op, Work, called, flat


class Case(NamedTuple):
    """Batch, heads, channels of a head."""

    b: int
    h: int
    p: int


TEST = [Case(1, 3, 8), Case(2, 2, 6)]
BENCH = [Case(1, 32, 64), Case(64, 10, 256)]
GPU = [*TEST, *BENCH]


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[dict, dict]:
    """Draw random arguments without gradients; with r = 1/2, log_a is between about -5e-7 and -5."""

    def random(*shape, kind=torch.float32):
        return torch.randn(shape, device=device).to(kind)

    b, h, p = case
    gates = {name: BlockGate(random(h, p, p) * p**-0.5, random(h, p)) for name in ("admits", "keeps")}
    rows = {"x": random(b, h * p), "u": random(b, 2 * h * p, kind=dtype)[:, h * p :]}
    strength = torch.linspace(-16, 1, h * p, device=device)
    return {}, flat(rows | gates | {"strength": strength, "c": 8.0, "state": random(b, h * p), "dtype": torch.float32})


def _work(case: Case) -> Work:
    """The blocks of both gates are read; the state is read and written."""
    blocks, states = case.h * case.p * case.p, case.b * case.h * case.p
    return Work((8.0 * (blocks + states), 4.0 * case.b * blocks), (8.0 * states, 0.0))


OPS = {
    "lru_token": Op(
        BENCH,
        draw,
        reference_token,
        "students.kernels.lru_token.kernel:lru_token",
        _work,
        small=lambda case: case._replace(b=min(case.b, 2), h=min(case.h, 3), p=min(case.p, 16)),
        call=called,
        backward=False,
        place=70,
    )
}
