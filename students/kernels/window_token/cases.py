"""Shapes and random inputs for tests and benchmarks of `window_token`."""

from typing import NamedTuple

import torch

from students.kernels.op import Op, Work, called, flat
from students.kernels.window_token import Keys, Norms, reference_token


class Case(NamedTuple):
    """Batch, heads, key heads, channels, window (None: all), sinks, rotated channels and their kind, norm, cap and share."""

    b: int
    h: int
    kv: int
    p: int
    window: int | None = 4
    sinks: int = 0
    r: int = 0
    rope: str | None = None
    norm: bool = False
    softcap: float | None = None
    share: bool = False


TEST = [
    Case(1, 4, 2, 8, 4, 2, 8, "half", share=True),
    Case(2, 3, 3, 6, 5, 3, 4, "pairs", softcap=5.0),
    Case(2, 4, 1, 8, 3, 0, 6, "half", norm=True),
    Case(1, 2, 2, 8, None),
    Case(2, 2, 1, 4, 1, 1),
]
BENCH = [
    Case(1, 32, 8, 64, 64, 4, 64, "half"),
    Case(3, 9, 3, 64, 64, 4, 64, "half"),
    Case(2, 16, 8, 128, 100, 4, 128, "half"),
]
GPU = [*TEST, *BENCH]
STEPS = 9


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[Keys, dict]:
    """Returns empty keys for STEPS tokens from column 0, and options; sequence i of the batch begins at column 2 i."""

    def zeros(places):
        return torch.zeros(case.b, places, case.kv, case.p, dtype=dtype, device=device)

    size = STEPS if case.window is None else min(case.window + 1, STEPS)
    sinks = (zeros(case.sinks), zeros(case.sinks)) if case.sinks else None
    offset = -2 * torch.arange(case.b, device=device)
    options = {"scale": case.p**-0.5, "softcap": case.softcap, "factors": torch.randn(case.h, device=device)}
    of_q, of_k = (1 + 0.1 * torch.randn(heads, case.p, device=device) for heads in (case.h, case.kv))
    options["share"] = torch.randn(case.b, case.h, device=device).to(dtype) if case.share else None
    options["norms"] = Norms(of_q, of_k, "rms", 1e-6) if case.norm else None
    return Keys(zeros(size), zeros(size), offset, case.window, sinks), options


def token(case: Case, at: int, dtype: torch.dtype, device: str) -> tuple[tuple, tuple | None]:
    """Draw q, k and v of a token, and its rotary tables."""
    parts = tuple(torch.randn(case.b, heads, case.p, device=device) for heads in (case.h, case.kv, case.kv))
    if case.rope is None:
        return parts, None
    angles = at * torch.rand(case.b, 1, case.r // 2, device=device)
    angles = torch.cat([angles, angles], -1)
    return parts, (angles.cos(), angles.sin(), case.rope)


def draw_flat(case: Case, dtype: torch.dtype, device: str) -> tuple[dict, dict]:
    """Draw one token's arguments after a full window, for benchmarks; none of them has a gradient."""
    keys, options = draw(case, dtype, device)
    assert case.window is not None, "benchmarks have a window"
    size = case.window + 1

    def random(like):
        return torch.randn(like.shape[0], size, *like.shape[2:], device=device).to(dtype)

    keys = keys._replace(k=random(keys.k), v=random(keys.v), offset=keys.offset * 0)
    (q, k, v), rope = token(case, size, dtype, device)
    more = {"column": torch.tensor([3 * size], device=device), "dtype": torch.float32, "rope": rope, "reads": None}
    return {}, flat({"q": q, "k": k, "v": v, "keys": keys} | more | options)


def _work(case: Case) -> Work:
    """Each key and value of the window is read once."""
    assert case.window is not None, "benchmarks have a window"
    size = 4.0 * case.b * case.kv * (case.window + case.sinks) * case.p
    return Work((size, 2.0 * size * case.h / case.kv), (size, 0.0))


OPS = {
    "window_token": Op(
        BENCH,
        draw_flat,
        reference_token,
        "students.kernels.window_token.kernel:window_token",
        _work,
        small=lambda case: case._replace(window=min(case.window, 9)),
        call=called,
        backward=False,
        place=70,
    )
}
