"""Shapes and random inputs for tests and benchmarks of `rotary_token`."""

from typing import NamedTuple

import torch

from students.kernels.op import Op, Work, called, flat
from students.kernels.rotary_token import Places, reference_token


class Case(NamedTuple):
    """Batch, heads, key heads, channels, rotated channels, whether there are norms."""

    b: int
    h: int
    kv: int
    p: int
    r: int
    norm: bool = False


TEST = [Case(1, 4, 2, 8, 8), Case(3, 3, 1, 6, 4, True)]
BENCH = [Case(1, 32, 8, 64, 64), Case(16, 16, 8, 128, 128, True)]
GPU = [*TEST, *BENCH]
PLACES = 5


def draw(case: Case, dtype: torch.dtype, device: str) -> dict:
    """Draw random arguments of `rotary_token`."""

    def random(*shape):
        return torch.randn(shape, device=device)

    q, k, v = (random(case.b, heads, case.p) for heads in (case.h, case.kv, case.kv))
    angles = random(case.b, 1, case.r // 2)
    angles = torch.cat([angles, angles], -1)
    keys, values = (random(case.b, case.kv, PLACES, case.p).to(dtype) for _ in range(2))
    norms = (1 + 0.1 * random(case.p), 1 + 0.1 * random(case.p), 1e-6) if case.norm else None
    places = Places(keys, values, torch.tensor([3], device=device))
    return {"q": q, "k": k, "v": v, "tables": (angles.cos(), angles.sin()), "places": places, "norms": norms}


def draw_flat(case: Case, dtype: torch.dtype, device: str) -> tuple[dict, dict]:
    """Draw the same for benchmarks; none of the arguments has a gradient."""
    return {}, flat(draw(case, dtype, device))


def _work(case: Case) -> Work:
    """Everything is read or written once."""
    size = 6.0 * case.b * (case.h + 2 * case.kv) * case.p
    return Work((size, size), (size, 0.0))


OPS = {
    "rotary_token": Op(
        BENCH,
        draw_flat,
        reference_token,
        "students.kernels.rotary_token.kernel:rotary_token",
        _work,
        small=lambda case: case._replace(b=min(case.b, 2)),
        call=called,
        backward=False,
        place=70,
    )
}
