"""Fused linear layers for decoding, in Triton.

For one sequence, a program computes a few rows of the weights in place; sets of rows are addressed by their distance in
memory from the first set. Products are accumulated element by element and summed once at the end, together with the norm's
factor. For several sequences, PyTorch's matrix products already run at memory speed; Triton only computes the norm and the
SwiGLU.
"""

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from students.kernels import launch
from students.kernels.token_linear import MOST, Rows, split


class Config(NamedTuple):
    """Rows of a program, columns of its tile, and warps."""

    rows: int
    width: int
    warps: int


CONFIGS = [Config(4, 1024, 4), Config(1, 2048, 4), Config(1, 1024, 2), Config(2, 1024, 4), Config(8, 512, 4)]
TALL = 4096  # number of rows from which a program computes several
SIZES = ["s1", "s2", "s3", "s4", "s5", "s6", "s7", "o1", "o2", "o3", "o4", "o5", "o6", "o7"]
BIAS_PLACES = ["c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7"]


def configs(rows: int, swiglu: bool) -> list[Config]:
    """Returns the shipped configurations for this number of rows, the default first."""
    best = CONFIGS[2] if swiglu else CONFIGS[0 if rows >= TALL else 1]
    return [best, *(each for each in CONFIGS if each != best)]


def token_linear(
    x: Tensor,
    rows: Sequence[Rows],
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    swiglu: bool,
    dtype: torch.dtype | None,
    also: tuple[Tensor, Rows] | None,
    config: Config | None = None,
) -> list[Tensor]:
    """See `students.kernels.token_linear.token_linear`."""
    if x.shape[0] > 1:
        return _few(x, rows, norm, residual, swiglu, dtype, also)
    dtype = torch.float32 if dtype is None else dtype
    narrow, wide = split(x, rows)
    width = x.shape[1]
    x, heights = launch.rows_of(x), [part.weight.shape[0] for part in narrow]
    starts = [0 if swiglu else sum(heights[:index]) for index in range(len(heights))]
    count = heights[0] if swiglu else sum(heights)
    extra = wide[0].weight.shape[0] if wide else 0
    config = config or configs(count, swiglu)[0]
    out = torch.empty((1, count + extra), dtype=dtype, device=x.device)
    first, biased = narrow[0].weight, [part.bias is not None for part in narrow]
    places = [_apart(part.weight, first) - start * width for part, start in zip(narrow, starts, strict=True)]
    bias = next((part.bias for part in narrow if part.bias is not None), first)
    bias_places = [
        0 if part.bias is None else _apart(part.bias, bias) - start for part, start in zip(narrow, starts, strict=True)
    ]
    x_also, other = (x, first) if also is None else (launch.rows_of(also[0]), also[1].weight)
    lane = 16 // first.element_size()
    wide_weight, wide_bias = (wide[0].weight, wide[0].bias) if wide else (first, None)
    weights = [*(part.weight for part in rows), other]
    aligned = all(weight.data_ptr() % 16 == 0 and weight.shape[1] % lane == 0 for weight in weights)
    with launch.on(x):
        _rows[(triton.cdiv(count, config.rows) + triton.cdiv(extra, config.rows),)](
            x, first, wide_weight, bias, wide_bias if wide_bias is not None else first, norm[0] if norm else first,
            residual if residual is not None else first, x_also, other, out, count, extra, norm[1] if norm else 0.0,
            *_filled(starts)[1:], *_filled(places)[1:], *_filled(bias_places),
            K=width, K2=other.shape[1], N=1 if swiglu else len(narrow), WIDE_BIAS=wide_bias is not None,
            BIASES=sum(has << index for index, has in enumerate(biased)), NORM=norm is not None,
            RESIDUAL=residual is not None, SWIGLU=swiglu, ALSO=also is not None, ALIGN=lane if aligned else 1,
            BR=config.rows, BK=_block(config, width), BK2=_block(config, other.shape[1]), num_warps=config.warps,
        )  # fmt: skip
    if swiglu:
        return [out]
    ends, place = {}, 0
    for part in (*narrow, *wide):
        ends[id(part)] = slice(place, place + part.weight.shape[0])
        place += part.weight.shape[0]
    return [out[:, ends[id(part)]] for part in rows]


def _apart(tensor: Tensor, first: Tensor) -> int:
    """Returns the distance in memory from `first` to `tensor`, in elements."""
    return (tensor.data_ptr() - first.data_ptr()) // first.element_size()


def _filled(numbers: list[int]) -> list[int]:
    return numbers + [0] * (MOST - len(numbers))


def _block(config: Config, width: int) -> int:
    return min(config.width, triton.next_power_of_2(width))


def _few(x, rows, norm, residual, swiglu, dtype, also) -> list[Tensor]:
    """Compute several sequences: PyTorch's matrix products, and one launch each for the norm and the SwiGLU."""
    if norm is not None:
        x = _normed(x, *norm)
    if also is not None:
        residual = _onto(residual, *also)
    outputs = [_product(x, part) for part in rows] if residual is None else [_onto(residual, x, rows[0])]
    if swiglu:
        outputs = [_opened(*outputs)]
    return outputs if dtype is None else [output.to(dtype) for output in outputs]


def _onto(residual: Tensor | None, x: Tensor, rows) -> Tensor:
    if residual is None:
        return F.linear(x, rows.weight, rows.bias)
    y = torch.addmm(residual, x, rows.weight.T)
    return y if rows.bias is None else y + rows.bias


def _product(x: Tensor, rows) -> Tensor:
    kind = torch.float32 if rows.wide else rows.weight.dtype
    bias = None if rows.bias is None else rows.bias.to(kind)
    return F.linear(x.to(kind), rows.weight.to(kind), bias)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, out = launch.rows_of(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    with launch.on(x):
        _norm[(len(x),)](x, weight, out, x.stride(0), x.shape[1], eps, BK=block, num_warps=min(8, max(1, block // 512)))
    return out


def _opened(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    with launch.on(gate):
        _open[(triton.cdiv(gate.numel(), 1024),)](gate, up, out, gate.numel(), BLOCK=1024, num_warps=4)
    return out


# Kernels. `no_type_check` excludes them from the tests' shape checker, which cannot read them.


@triton.jit
@no_type_check
def _norm(x, weight, out, sxb, K, eps, BK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    v = tl.load(x + b * sxb + k, mask=k < K, other=0.0).to(tl.float32)
    v = (v * tl.rsqrt(tl.sum(v * v, 0) / K + eps)).to(out.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + b * K + k, (v * w).to(out.dtype.element_ty), mask=k < K)


@triton.jit
@no_type_check
def _open(gate, up, out, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < size, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(out + i, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=i < size)


@triton.jit
@no_type_check
def _sum(
    x, w, offset, here, norm, eps, K: tl.constexpr, NORM: tl.constexpr, ALIGN: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Multiply the input by the rows at `offset` from w."""
    if ALIGN > 1:
        offset = tl.multiple_of(offset, [ALIGN])
    acc = tl.zeros((BR, BK), dtype=tl.float32)
    square = tl.zeros((BK,), dtype=tl.float32)
    for start in tl.static_range(0, K, BK):
        k = start + tl.arange(0, BK)
        m = tl.load(w + offset[:, None] + k[None, :], mask=here[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        u = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM:
            square += u * u
            u = u * tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        acc += m * u[None, :]
    y = tl.sum(acc, 1)
    if NORM:
        y = y * tl.rsqrt(tl.sum(square, 0) / K + eps)
    return y


@triton.jit(do_not_specialize=SIZES + BIAS_PLACES + ["R1", "R2"])
@no_type_check
def _rows(
    x, w, v, bias, wide_bias, norm, residual, x2, w2, out, R1, R2, eps,
    s1, s2, s3, s4, s5, s6, s7,
    o1: tl.int64, o2: tl.int64, o3: tl.int64, o4: tl.int64, o5: tl.int64, o6: tl.int64, o7: tl.int64,
    c0: tl.int64, c1: tl.int64, c2: tl.int64, c3: tl.int64, c4: tl.int64, c5: tl.int64, c6: tl.int64, c7: tl.int64,
    K: tl.constexpr, K2: tl.constexpr, N: tl.constexpr, WIDE_BIAS: tl.constexpr, BIASES: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr, ALSO: tl.constexpr, ALIGN: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, BK2: tl.constexpr,
):  # fmt: skip
    first = tl.cdiv(R1, BR)
    if tl.program_id(0) < first:
        row = tl.program_id(0) * BR + tl.arange(0, BR)
        inside = row < R1
        offset = tl.zeros((BR,), dtype=tl.int64)
        if N > 1:
            offset = tl.where(row >= s1, o1, offset)
        if N > 2:
            offset = tl.where(row >= s2, o2, offset)
        if N > 3:
            offset = tl.where(row >= s3, o3, offset)
        if N > 4:
            offset = tl.where(row >= s4, o4, offset)
        if N > 5:
            offset = tl.where(row >= s5, o5, offset)
        if N > 6:
            offset = tl.where(row >= s6, o6, offset)
        if N > 7:
            offset = tl.where(row >= s7, o7, offset)
        offset += row.to(tl.int64) * K
        y = _sum(x, w, offset, inside, norm, eps, K, NORM, ALIGN, BR, BK)
        if ALSO:
            y += _sum(x2, w2, row.to(tl.int64) * K2, inside, norm, eps, K2, False, ALIGN, BR, BK2)
        if BIASES:
            here = row >= (1 - BIASES % 2) * R1
            offset = tl.zeros((BR,), dtype=tl.int64) + c0
            if N > 1:
                here = tl.where(row >= s1, (BIASES >> 1) % 2 == 1, here)
                offset = tl.where(row >= s1, c1, offset)
            if N > 2:
                here = tl.where(row >= s2, (BIASES >> 2) % 2 == 1, here)
                offset = tl.where(row >= s2, c2, offset)
            if N > 3:
                here = tl.where(row >= s3, (BIASES >> 3) % 2 == 1, here)
                offset = tl.where(row >= s3, c3, offset)
            if N > 4:
                here = tl.where(row >= s4, (BIASES >> 4) % 2 == 1, here)
                offset = tl.where(row >= s4, c4, offset)
            if N > 5:
                here = tl.where(row >= s5, (BIASES >> 5) % 2 == 1, here)
                offset = tl.where(row >= s5, c5, offset)
            if N > 6:
                here = tl.where(row >= s6, (BIASES >> 6) % 2 == 1, here)
                offset = tl.where(row >= s6, c6, offset)
            if N > 7:
                here = tl.where(row >= s7, (BIASES >> 7) % 2 == 1, here)
                offset = tl.where(row >= s7, c7, offset)
            y += tl.load(bias + offset + row, mask=here & inside, other=0.0).to(tl.float32)
        if SWIGLU:
            up = _sum(x, w, row.to(tl.int64) * K + o1, inside, norm, eps, K, NORM, ALIGN, BR, BK)
            if BIASES >= 2:
                up += tl.load(bias + c1 + row, mask=inside, other=0.0).to(tl.float32)
            y = y * tl.sigmoid(y) * up
        if RESIDUAL:
            y += tl.load(residual + row, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row, y.to(out.dtype.element_ty), mask=inside)
    else:
        row = (tl.program_id(0) - first) * BR + tl.arange(0, BR)
        inside = row < R2
        y = _sum(x, v, row.to(tl.int64) * K, inside, norm, eps, K, NORM, ALIGN, BR, BK)
        if WIDE_BIAS:
            y += tl.load(wide_bias + row, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + R1 + row, y.to(out.dtype.element_ty), mask=inside)
