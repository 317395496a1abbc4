"""Shapes and random inputs for tests and benchmarks of `ssm_token`."""

from typing import NamedTuple

import torch

from students.kernels.op import Op, Work, called, flat
from students.kernels.ssm_token import Conv, Gate, Lag, reference_token


class Case(NamedTuple):
    """Batch, heads, groups, values, states, taps; whether stock, gated, normalised; the lag; heads per share."""

    b: int
    h: int
    g: int
    p: int
    n: int
    w: int = 4
    stock: bool = False
    gate: bool = True
    norm: bool = False
    lag: int = 0
    share: int = 0


TEST = [
    Case(1, 2, 2, 8, 8),
    Case(2, 3, 3, 6, 5, norm=True, lag=3, share=1),
    Case(1, 4, 2, 8, 8, share=2),
    Case(2, 4, 2, 8, 4, stock=True, gate=False, lag=4),
    Case(1, 4, 1, 4, 8, w=2, stock=True, gate=False),
    Case(2, 2, 2, 16, 16, w=1, lag=1),
]
BENCH = [  # Llama-3.2-1B's heads, alone and with windows; with companion heads; SmolLM2's
    Case(1, 32, 32, 64, 64),
    Case(1, 32, 32, 64, 64, lag=64),
    Case(3, 32, 32, 64, 64, norm=True),
    Case(1, 64, 32, 64, 64, stock=True, gate=False, lag=64),
    Case(64, 9, 9, 64, 64),
]
GPU = [*TEST, *BENCH, Case(1100, 64, 64, 2, 2)]  # the last: more rows than a grid's second axis holds
STEPS = 6


def draw(case: Case, dtype: torch.dtype, device: str) -> dict:
    """Draw random arguments of `ssm_token` except the token's own, with the rings empty as before a sequence."""
    b, h, g, p, n = case[:5]
    channels = h * p + 2 * g * n

    def random(*shape, kind=torch.float32):
        return torch.randn(shape, device=device).to(kind)

    def zeros(*shape, kind=dtype):
        return torch.zeros(shape, dtype=kind, device=device)

    lag = None
    if case.lag:
        size = case.lag + 1
        sums = zeros(b, size, h, kind=torch.float32), zeros(b, 2, h, kind=torch.float64)
        lag = Lag(zeros(b, size, h, p), zeros(b, size, g, n), *sums)
    gate = None
    if case.gate:
        norm = 1 + 0.1 * random(h, p) if case.norm else None
        share = random(b, h // case.share, kind=dtype) if case.share else None
        gate = Gate(random(b, h * p, kind=dtype), norm, 1e-5, (random(h), random(h)), share)
    return {
        "conv": Conv(
            random(channels, case.w) / 2, random(channels), "silu" if case.stock else None, zeros(b, case.w, channels)
        ),
        "D": random(h),
        "state": random(b, h, p, n),
        "stock": (random(h), random(h)) if case.stock else None,
        "gate": gate,
        "lag": lag,
    }


def tokens(case: Case, dtype: torch.dtype, device: str) -> list[tuple]:
    """Draw inputs and decays of STEPS successive tokens."""
    channels = case.h * case.p + 2 * case.g * case.n
    shapes = (case.b, channels), (case.b, case.h)
    return [tuple(torch.randn(shape, device=device) for shape in shapes) for _ in range(STEPS)]


def draw_flat(case: Case, dtype: torch.dtype, device: str) -> tuple[dict, dict]:
    """Draw one token's arguments for benchmarks; none of them has a gradient."""
    x, decay = tokens(case, dtype, device)[0]
    more = {"column": torch.tensor([5], device=device), "dtype": torch.float32, "groups": case.g, "rope": None}
    return {}, flat({"x": x, "decay": decay} | draw(case, dtype, device) | more)


def _work(case: Case) -> Work:
    """The state is read and written once."""
    states = case.b * case.h * case.p * case.n
    return Work((8.0 * states, 5.0 * states), (8.0 * states, 0.0))


OPS = {
    "ssm_token": Op(
        BENCH,
        draw_flat,
        reference_token,
        "students.kernels.ssm_token.kernel:ssm_token",
        _work,
        small=lambda case: case._replace(b=min(case.b, 2), h=min(case.h, 4), g=min(case.g, 2)),
        choices=lambda kernel, case, dtype: kernel.CONFIGS,
        call=called,
        backward=False,
        place=70,
    )
}
