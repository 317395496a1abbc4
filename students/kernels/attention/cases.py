"""Shapes that tests and benchmarks of `attention` run on, and inputs of these shapes."""

from typing import NamedTuple

import torch
from torch import Tensor

from students.kernels.attention import reference_attention
from students.kernels.documents import positions
from students.kernels.op import Op, Work


class Case(NamedTuple):
    """Batch, queries, heads, key heads, head width, window, sinks, packed documents, soft cap, keys before the queries."""

    b: int
    t: int
    h: int
    kv: int
    d: int
    window: int | None
    sinks: int
    packed: bool = False
    softcap: float | None = None
    before: int = 0


TEST = [
    Case(1, 1, 1, 1, 4, None, 0),
    Case(2, 63, 2, 2, 8, None, 0, packed=True),
    Case(2, 5, 2, 1, 8, 16, 4, packed=True, before=35),
    Case(2, 300, 3, 3, 4, 16, 4, packed=True),
    Case(1, 257, 2, 1, 4, 100, 2, packed=True, softcap=5.0),
    Case(2, 200, 1, 1, 8, 7, 0),
    Case(1, 260, 2, 1, 4, 40, 200),
    Case(2, 300, 4, 2, 4, 16, 0, packed=True),
]
BENCH = [Case(8, 2048, 32, 8, 64, 64, 4), Case(8, 2048, 32, 8, 64, 1024, 4), Case(2, 8192, 32, 8, 128, 2048, 0)]
DOCUMENT = 50  # tokens of a packed document, about


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Random inputs by name: those that have a gradient, and the others."""
    keys = case.t + case.before
    sizes = {"q": (case.t, case.h), "k": (keys, case.kv), "v": (keys, case.kv)}
    leaves = {name: torch.randn(case.b, *size, case.d, dtype=dtype, device=device) for name, size in sizes.items()}
    documents = torch.zeros(case.b, keys, dtype=torch.long, device=device)
    if case.packed:
        documents = (torch.rand(case.b, keys, device=device) < 1 / DOCUMENT).long().cumsum(1)
    fixed = {"scale": case.d**-0.5, "softcap": case.softcap, "window": case.window, "sinks": case.sinks}
    fixed["documents"] = documents if case.packed or case.sinks else None
    return leaves, fixed | {"positions": positions(documents) if case.sinks else None}


def _work(case: Case) -> Work:
    """Every pair of a query and a key that it sees, two products of `d` forward and four backward."""
    window, queries = case.window or case.t, torch.arange(1, case.t + 1)
    pairs = queries.clamp(max=window).sum() + (queries - window).clamp(0, case.sinks).sum()
    flop = 4.0 * case.b * case.h * case.d * pairs.item()
    rows, keys = (2.0 * case.b * case.t * heads * case.d for heads in (case.h, case.kv))
    return Work((2 * rows + 2 * keys, flop), (2 * rows + 2 * keys + 4 * rows + 4 * keys, 3 * flop))


OPS = {
    "attention": Op(
        BENCH,
        draw,
        reference_attention,
        "students.kernels.attention.kernel:attention",
        _work,
        choices=lambda kernel, case, dtype: kernel.configs(dtype, case.d, case.window),
        place=15,
    )
}
