"""Shapes that tests of `window_token` run on, and inputs of these shapes."""

from typing import NamedTuple

import torch

from students.kernels.window_token import Keys, Norms


class Case(NamedTuple):
    """Batch, heads, key heads, channels, window (None: all), sinks, rotated channels and how, norm and cap."""

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


TEST = [
    Case(1, 4, 2, 8, 4, 2, 8, "half"),
    Case(2, 3, 3, 6, 5, 3, 4, "pairs", softcap=5.0),
    Case(2, 4, 1, 8, 3, 0, 6, "half", norm=True),
    Case(1, 2, 2, 8, None),
    Case(2, 2, 1, 4, 1, 1),
]
GPU = [
    *TEST,
    Case(1, 32, 8, 64, 64, 4, 64, "half"),
    Case(3, 9, 3, 64, 64, 4, 64, "half"),
    Case(2, 16, 8, 128, 100, 4, 128, "half"),
]
STEPS = 12


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[Keys, dict]:
    """Empty keys with room for all tokens of a test that begins at column 0, the rows' texts at columns 0, -2 ..."""

    def zeros(places):
        return torch.zeros(case.b, places, case.kv, case.p, dtype=dtype, device=device)

    size = STEPS if case.window is None else min(case.window + 1, STEPS)
    sinks = (zeros(case.sinks), zeros(case.sinks)) if case.sinks else None
    offset = -2 * torch.arange(case.b, device=device)
    options = {"scale": case.p**-0.5, "softcap": case.softcap, "factors": torch.randn(case.h, device=device)}
    weights = (1 + 0.1 * torch.randn(heads, case.p, device=device) for heads in (case.h, case.kv))
    options["norms"] = Norms(*weights, "rms", 1e-6) if case.norm else None
    return Keys(zeros(size), zeros(size), offset, case.window, sinks), options


def token(case: Case, at: int, dtype: torch.dtype, device: str) -> tuple[tuple, tuple | None]:
    """q, k and v of a token, and its rotary tables."""
    parts = tuple(torch.randn(case.b, heads, case.p, device=device) for heads in (case.h, case.kv, case.kv))
    if case.rope is None:
        return parts, None
    angles = at * torch.rand(case.b, 1, case.r // 2, device=device)
    angles = torch.cat([angles, angles], -1)
    return parts, (angles.cos(), angles.sin(), case.rope)
