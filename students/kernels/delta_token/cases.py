"""Shapes and random inputs for tests and benchmarks of `delta_token`."""

from typing import NamedTuple

import torch

from students.kernels.delta_token import Decay, reference_token
from students.kernels.op import Op, Work, called, flat
from students.kernels.ssm_token import Conv


class Case(NamedTuple):
    """Batch, heads, values, keys, taps, and whether the convolution has a bias."""

    b: int
    h: int
    p: int
    n: int
    w: int = 4
    biased: bool = False


TEST = [Case(1, 2, 8, 8), Case(2, 3, 6, 5, 3, True)]
BENCH = [Case(1, 32, 64, 64), Case(8, 16, 128, 128, biased=True)]
GPU = [*TEST, *BENCH]
STEPS = 6


def draw(case: Case, dtype: torch.dtype, device: str) -> dict:
    """Draw random arguments of `delta_token` except the token's own, with the ring empty as before a sequence."""
    channels = case.h * (case.p + 2 * case.n)

    def random(*shape):
        return torch.randn(shape, device=device)

    ring = torch.zeros(case.b, case.w, channels, dtype=dtype, device=device)
    return {
        "conv": Conv(random(channels, case.w) / 2, random(channels) if case.biased else None, "silu", ring),
        "decays": Decay(random(case.h), random(case.h)),
        "norm": (1 + 0.1 * random(case.p), 1e-5),
        "state": random(case.b, case.h, case.p, case.n),
    }


def token(case: Case, device: str) -> dict:
    """Draw a token's inputs."""
    widths = {"x": case.h * (case.p + 2 * case.n), "b": case.h, "decay": case.h, "z": case.h * case.p}
    return {name: torch.randn(case.b, width, device=device) for name, width in widths.items()}


def draw_flat(case: Case, dtype: torch.dtype, device: str) -> tuple[dict, dict]:
    """Draw one token's arguments for benchmarks; none of them has a gradient."""
    more = {"column": torch.tensor([5], device=device), "dtype": torch.float32}
    return {}, flat(token(case, device) | draw(case, dtype, device) | more)


def _work(case: Case) -> Work:
    """The state is read and written once."""
    states = case.b * case.h * case.p * case.n
    return Work((8.0 * states, 7.0 * states), (8.0 * states, 0.0))


OPS = {
    "delta_token": Op(
        BENCH,
        draw_flat,
        reference_token,
        "students.kernels.delta_token.kernel:delta_token",
        _work,
        small=lambda case: case._replace(b=min(case.b, 2), h=min(case.h, 2)),
        choices=lambda kernel, case, dtype: kernel.CONFIGS,
        call=called,
        backward=False,
        place=70,
    )
}
