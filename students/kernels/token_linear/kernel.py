"""One token through several linear layers in Triton.

A program takes a few rows of the weights, wherever they stand: sets of rows are addressed by how far they are from the first
one. One text is multiplied element by element and summed once at the end; a few texts are a product of matrices.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels import launch
from students.kernels.token_linear import MOST, split


class Config(NamedTuple):
    """Rows of a program, columns of its tile, warps, and stages of its pipeline."""

    rows: int
    width: int
    warps: int
    stages: int = 1


ONE = [Config(4, 1024, 4), Config(2, 1024, 4), Config(8, 512, 4), Config(4, 512, 2), Config(8, 1024, 8), Config(1, 2048, 4)]
FEW = [Config(16, 128, 4, 4), Config(32, 128, 4, 3), Config(16, 256, 4, 3)]  # the default first
SIZES = ["s1", "s2", "s3", "s4", "s5", "s6", "s7", "o1", "o2", "o3", "o4", "o5", "o6", "o7"]
BIAS_PLACES = ["c1", "c2", "c3", "c4", "c5", "c6", "c7"]


def configs(batch: int) -> list[Config]:
    """What is shipped for so many texts, the default first."""
    return ONE if batch == 1 else FEW


def token_linear(x, rows, norm, residual, swiglu, dtype, config: Config | None = None) -> list[Tensor]:
    """See `students.kernels.token_linear.token_linear`."""
    narrow, wide = split(x, rows)
    (batch, width), config = x.shape, config or configs(x.shape[0])[0]
    x, heights = launch.rows_of(x), [part.weight.shape[0] for part in narrow]
    starts = [sum(heights[:index]) for index in range(len(heights))]
    count = heights[0] if swiglu else sum(heights)
    extra = wide[0].weight.shape[0] if wide else 0
    out = torch.empty((batch, count + extra), dtype=dtype, device=x.device)
    first, biased = narrow[0].weight, [part.bias is not None for part in narrow]
    places = [_apart(part.weight, first) - start * width * (not swiglu) for part, start in zip(narrow, starts, strict=True)]
    bias = next((part.bias for part in narrow if part.bias is not None), first)
    bias_places = [
        0 if part.bias is None else _apart(part.bias, bias) - start * (not swiglu)
        for part, start in zip(narrow, starts, strict=True)
    ]
    lane = 16 // first.element_size()
    weights = [part.weight for part in rows]
    aligned = all(weight.data_ptr() % 16 == 0 for weight in weights) and width % lane == 0
    block = min(config.width, triton.next_power_of_2(width))
    block = block if batch == 1 else max(block, launch.SMALLEST)
    height = config.rows
    programs = triton.cdiv(count, height) + triton.cdiv(extra, height)
    wide_weight, wide_bias = (wide[0].weight, wide[0].bias) if wide else (first, None)
    with launch.on(x):
        _rows[(programs,)](
            x, first, wide_weight, bias, wide_bias if wide_bias is not None else first,
            norm[0] if norm else first, residual if residual is not None else first, out,
            batch, x.stride(0), residual.stride(0) if residual is not None else 0, out.stride(0), count, extra,
            norm[1] if norm else 0.0, *_filled(starts)[1:], *_filled(places)[1:], *_filled(bias_places),
            K=width, N=1 if swiglu else len(narrow), BIASES=sum(has << index for index, has in enumerate(biased)),
            WIDE_BIAS=wide_bias is not None, NORM=norm is not None, RESIDUAL=residual is not None, SWIGLU=swiglu,
            ALIGN=lane if aligned else 1, SINGLE=batch == 1, BB=1 if batch == 1 else launch.tile(batch), BR=height, BK=block,
            PRECISION=launch.precision(x.dtype), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    ends = {}
    place = 0
    for part in narrow[:1] if swiglu else [*narrow, *wide]:
        ends[id(part.weight)] = slice(place, place + part.weight.shape[0])
        place += part.weight.shape[0]
    return [out] if swiglu else [out[:, ends[id(part.weight)]] for part in rows]


def _apart(tensor: Tensor, first: Tensor) -> int:
    """How many elements a tensor stands behind another."""
    return (tensor.data_ptr() - first.data_ptr()) // first.element_size()


def _filled(numbers: list[int]) -> list[int]:
    return numbers + [0] * (MOST - len(numbers))


# Kernels. no_type_check keeps the tests' shape checker, which cannot read them, away.


@triton.jit
@no_type_check
def _product(
    x, w, offset, here, norm, B, sxb, eps, K: tl.constexpr, NORM: tl.constexpr, ALIGN: tl.constexpr, SINGLE: tl.constexpr,
    BB: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The input times some rows, each `offset` behind w: [BB BR] in float32."""
    if ALIGN > 1:
        offset = tl.multiple_of(offset, [ALIGN])
    if SINGLE:
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
        y = y[None, :]
    else:
        b = tl.arange(0, BB)
        y = tl.zeros((BB, BR), dtype=tl.float32)
        square = tl.zeros((BB,), dtype=tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            m = tl.load(w + offset[None, :] + k[:, None], mask=here[None, :] & (k < K)[:, None], other=0.0)
            u = tl.load(x + b[:, None] * sxb + k[None, :], mask=(b < B)[:, None] & (k < K)[None, :], other=0.0).to(
                tl.float32
            )
            if NORM:
                square += tl.sum(u * u, 1)
                u = u * tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            y = tl.dot(u.to(m.dtype), m, y, input_precision=PRECISION)
        if NORM:
            y = y * tl.rsqrt(square / K + eps)[:, None]
    return y


@triton.jit(do_not_specialize=SIZES + BIAS_PLACES + ["c0", "B", "R1", "R2"])
@no_type_check
def _rows(
    x, w, v, bias, wide_bias, norm, residual, out, B, sxb, srb, sob, R1, R2, eps,
    s1, s2, s3, s4, s5, s6, s7,
    o1: tl.int64, o2: tl.int64, o3: tl.int64, o4: tl.int64, o5: tl.int64, o6: tl.int64, o7: tl.int64,
    c0: tl.int64, c1: tl.int64, c2: tl.int64, c3: tl.int64, c4: tl.int64, c5: tl.int64, c6: tl.int64, c7: tl.int64,
    K: tl.constexpr, N: tl.constexpr, BIASES: tl.constexpr, WIDE_BIAS: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr, ALIGN: tl.constexpr, SINGLE: tl.constexpr, BB: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = tl.arange(0, BB)
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
        y = _product(x, w, offset, inside, norm, B, sxb, eps, K, NORM, ALIGN, SINGLE, BB, BR, BK, PRECISION)
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
            y += tl.load(bias + offset + row, mask=here & inside, other=0.0).to(tl.float32)[None, :]
        if SWIGLU:
            above = row.to(tl.int64) * K + o1
            up = _product(x, w, above, inside, norm, B, sxb, eps, K, NORM, ALIGN, SINGLE, BB, BR, BK, PRECISION)
            if BIASES >= 2:
                up += tl.load(bias + c1 + row, mask=inside, other=0.0).to(tl.float32)[None, :]
            y = y * tl.sigmoid(y) * up
        store = (b < B)[:, None] & inside[None, :]
        if RESIDUAL:
            y += tl.load(residual + b[:, None] * srb + row[None, :], mask=store, other=0.0).to(tl.float32)
        tl.store(out + b[:, None] * sob + row[None, :], y.to(out.dtype.element_ty), mask=store)
    else:
        row = (tl.program_id(0) - first) * BR + tl.arange(0, BR)
        inside = row < R2
        offset = row.to(tl.int64) * K
        y = _product(x, v, offset, inside, norm, B, sxb, eps, K, NORM, ALIGN, SINGLE, BB, BR, BK, PRECISION)
        if WIDE_BIAS:
            y += tl.load(wide_bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
        store = (b < B)[:, None] & inside[None, :]
        tl.store(out + b[:, None] * sob + R1 + row[None, :], y.to(out.dtype.element_ty), mask=store)
