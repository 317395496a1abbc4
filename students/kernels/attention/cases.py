"""Shapes and random inputs for tests and benchmarks of `attention` and `attend_places`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from students.kernels.attention import reference_attention, reference_places
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
DOCUMENT = 50  # tokens of a packed document, on average


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Draw random inputs by name: those that have a gradient, and the others."""
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
    """Each pair of a query and a key that it sees costs two products of `d` channels forward and four backward."""
    window, queries = case.window or case.t, torch.arange(1, case.t + 1)
    pairs = queries.clamp(max=window).sum() + (queries - window).clamp(0, case.sinks).sum()
    flop = 4.0 * case.b * case.h * case.d * pairs.item()
    rows, keys = (2.0 * case.b * case.t * heads * case.d for heads in (case.h, case.kv))
    return Work((2 * rows + 2 * keys, flop), (2 * rows + 2 * keys + 4 * rows + 4 * keys, 3 * flop))


class Places(NamedTuple):
    """Batch, queries, heads, key heads, head width, places, and options.

    padded: sequences begin with padding. masked: there is a mask. text: columns of the sequence (default: the places).
    """

    b: int
    t: int
    h: int
    kv: int
    d: int
    s: int
    window: int | None = None
    padded: bool = False
    softcap: float | None = None
    masked: bool = False
    text: int | None = None


TEST_PLACES = [
    Places(1, 1, 1, 1, 4, 1),
    Places(2, 1, 4, 2, 8, 100, text=60),
    Places(2, 1, 4, 1, 24, 70, padded=True, softcap=5.0),
    Places(2, 1, 6, 2, 8, 40, 40, padded=True, text=131),
    Places(2, 3, 4, 2, 8, 100, 33, padded=True, text=90),
    Places(2, 3, 4, 1, 8, 40, 30, padded=True, text=131),
    Places(2, 8, 10, 2, 8, 90, masked=True, text=80),
    Places(2, 1, 3, 3, 8, 50, masked=True, padded=True, text=49),
]
BENCH_PLACES = [
    *(Places(1, 1, 32, 8, 64, s) for s in (2048, 16_384, 65_536, 131_072)),
    Places(256, 1, 32, 8, 64, 2048),
    Places(1, 1, 32, 8, 128, 65_536),
    Places(1, 1, 9, 3, 64, 32_768),
    Places(64, 1, 32, 8, 64, 64, 64, text=5000),
]


def draw_places(case: Places, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Draw random inputs with keys in the layout of transformers' caches; none of them has a gradient."""
    sizes = {"q": (case.h, case.t), "k": (case.kv, case.s), "v": (case.kv, case.s)}
    drawn = {name: torch.randn(case.b, *size, case.d, dtype=dtype, device=device) for name, size in sizes.items()}
    fixed: dict[str, Any] = {name: part.transpose(1, 2) for name, part in drawn.items()}
    columns = case.text or case.s
    fixed |= {"scale": case.d**-0.5, "softcap": case.softcap, "window": case.window}
    fixed["last"] = torch.tensor([columns - 1], device=device)
    fixed["start"] = torch.arange(case.b, device=device) * (columns - 1) // case.b if case.padded else None
    fixed["mask"] = torch.randint(0, 3, (case.b, case.s), device=device) if case.masked else None
    fixed["document"] = torch.arange(case.b, device=device) % 2 + 1 if case.masked and case.padded else None
    fixed["new"] = None
    if case.t > 1 or case.padded:
        fixed["new"] = tuple(torch.randn(case.b, case.t, case.kv, case.d, dtype=dtype, device=device) for _ in "kv")
    return {}, fixed


def _work_places(case: Places) -> Work:
    """Each key and value is read once."""
    seen = min(case.text or case.s, case.s, case.window or case.s)
    size = 2.0 * case.b * (2 * case.kv * seen + 2 * case.h * case.t) * case.d
    flop = 4.0 * case.b * case.h * case.t * seen * case.d
    return Work((size, flop), (size, flop))


OPS = {
    "attention_places": Op(
        BENCH_PLACES,
        draw_places,
        reference_places,
        "students.kernels.attention.decode:attend_places",
        _work_places,
        small=lambda case: case._replace(b=min(case.b, 2), s=min(case.s, 300)),
        choices=lambda kernel, case, dtype: kernel.configs(dtype, case.d),
        backward=False,
        place=16,
    ),
    "attention": Op(
        BENCH,
        draw,
        reference_attention,
        "students.kernels.attention.kernel:attention",
        _work,
        choices=lambda kernel, case, dtype: kernel.configs(dtype, case.d, case.window),
        place=15,
    ),
}
