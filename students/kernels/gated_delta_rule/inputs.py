"""Random inputs of `gated_delta_rule`, and the case on which a kernel is checked against the reference before use."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from students.kernels.documents import random_documents


class Case(NamedTuple):
    """Batch, time, heads, key heads, value width, key width, and whether documents are packed."""

    b: int
    t: int
    h: int
    g: int
    p: int
    n: int
    packed: bool


def check(values: int, keys: int) -> Case:
    """Returns the case on which an implementation is compared with the reference before it runs on a GPU at these widths."""
    return Case(2, 300, 2, 2, values, keys, True)


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Draw random inputs by name, with normalised keys and queries: those that have a gradient, and the others."""
    b, t, h, g, p, n = case[:6]
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    leaves = {
        "q": F.normalize(torch.randn(b, t, g, n, device=device), dim=-1).to(dtype),
        "k": F.normalize(torch.randn(b, t, g, n, device=device), dim=-1).to(dtype),
        "v": torch.randn(b, t, h, p, **options),
        "log_a": -0.3 * torch.rand(b, t, h, device=device),
        "beta": torch.rand(b, t, h, **options),
        "initial_state": torch.randn(b, h, p, n, device=device),
    }
    return leaves, {"documents": random_documents(b, t, device) if case.packed else None}
