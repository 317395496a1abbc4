"""Decoding attention in Triton: one or a few queries over the keys and values of a cache, divided into shares of its places.

A program attends with all queries of one key head to one share of the places, so that each key is read once (flash-decoding,
https://pytorch.org/blog/flash-decoding). The number of shares depends on the device and the batch. Every program computes
the length of its share from the length of the sequence, which it reads from memory. So a captured CUDA graph stays valid as
the sequence grows, and reserved places cost no time. A second kernel joins the shares' outputs in float32, weighted by their
sums, in the order of the places. (Joining them in the last program, found by an atomic counter, took 2 us longer on an H100:
LOG.md.)

The newest tokens' keys and values may be passed separately. Then the first share reads them from there and writes them into
their places, which no other program reads in this launch. This saves two copies per layer and token.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels import launch
from students.kernels.attention.kernel import _attend
from students.kernels.attention.tile import rows_at

SIZES = ["s", "kv", "window", "shares"]  # they vary, so no kernels are specialised for 1 and multiples of 16
BUSY = 0.8  # least fraction of the programs that can run at the same time


class Config(NamedTuple):
    """Keys of a tile, warps, pipeline stages, programs per multiprocessor."""

    keys: int
    warps: int
    stages: int
    programs: int


# By the widest head that each serves: the default first. Tests compare all with float64 on a GPU.
CONFIGS_16 = {
    64: [Config(128, 4, 3, 1), Config(64, 4, 3, 2)],
    128: [Config(64, 4, 3, 2)],
    256: [Config(32, 4, 3, 2)],
}
CONFIGS_32 = {64: [Config(32, 4, 3, 2)], 128: [Config(32, 4, 2, 2)], 256: [Config(16, 4, 2, 2)]}  # 4-byte keys


def configs(dtype: torch.dtype, width: int) -> list[Config]:
    """Returns the shipped configurations for heads of this width, the default first."""
    table = CONFIGS_16 if dtype.itemsize == 2 else CONFIGS_32
    return next(choices for widest, choices in table.items() if width <= widest)


def attend_places(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    last: Tensor | None,
    window: int | None,
    start: Tensor | None,
    mask: Tensor | None,
    document: Tensor | None,
    new: tuple[Tensor, Tensor] | None,
    config: Config | None = None,
) -> Tensor:
    """See `students.kernels.attention.attend_places`. Tests and benchmarks may set the configuration."""
    config = config or configs(k.dtype, max(q.shape[3], v.shape[3]))[0]
    q, k, v = (launch.rows_of(part.detach()) for part in (q, k, v))
    (batch, time, heads, width), (_, places, kv, values) = q.shape, v.shape
    rows, pairs = time * heads // kv, batch * kv
    shares = min(triton.cdiv(places, config.keys), _shares(pairs, config.programs * launch.multiprocessors(q)))
    y = torch.empty((batch, time, heads, values), dtype=q.dtype, device=q.device)
    parts, sums = y, y  # placeholders that are never used
    if shares > 1:
        parts = torch.empty((pairs, shares, rows, values), dtype=torch.float32, device=q.device)
        sums = torch.empty((2, pairs, shares, rows), dtype=torch.float32, device=q.device)
    mask = _numbers(mask, batch)
    fresh = (q, q) if new is None else [launch.rows_of(part.detach()) for part in new]
    given = [q if part is None else part for part in (last, start, mask, document)]
    sizes = places, kv, scale, softcap or 1.0, places if window is None else window, shares
    shape = {
        "T": time, "GROUP": heads // kv, "GROWING": last is not None, "STARTED": start is not None,
        "WINDOWED": window is not None, "NEW": new is not None, "BN": config.keys, "P": values,
        "PT": launch.tile(values), "ST": triton.next_power_of_2(shares), "SHARED": shares > 1,
    }  # fmt: skip
    strides = [stride for part in (q, k, v, *fresh) for stride in part.stride()[:3]]
    with launch.on(q):
        _share[(shares * pairs,)](
            q, k, v, *fresh, *given, y, parts, sums, *strides, 0 if mask is None else mask.stride(0), *sizes, **shape,
            MASKED=mask is not None, NAMED=document is not None, CAPPED=softcap is not None, D=width, DT=launch.tile(width),
            RT=launch.tile(rows), NT=launch.tile(time), PREC=launch.precision(q.dtype), num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
        if shares > 1:
            _join[(rows * pairs,)](*given[:2], parts, sums, y, *sizes, **shape, num_warps=4)
    return y


def _shares(pairs: int, programs: int) -> int:
    """Returns the number of shares that fills the device.

    There are no more programs than can run at the same time, unless less than BUSY of the device would be used.
    """
    shares = max(1, programs // pairs)
    return shares + 1 if shares * pairs < BUSY * programs else shares


def _numbers(mask: Tensor | None, batch: int) -> Tensor | None:
    """Returns a mask as integers that a kernel can read, each row contiguous."""
    if mask is None:
        return None
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return launch.rows_of(mask).expand(batch, -1)


# Kernels. `no_type_check` excludes them from the tests' shape checker, which cannot read them.


@triton.jit
@no_type_check
def _places_of(last, start, b, s, window, shares, T: tl.constexpr, GROWING: tl.constexpr, STARTED: tl.constexpr,
               WINDOWED: tl.constexpr, NEW: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Returns the newest token's column, the first column that any query sees, the first place to read, the end of the
    places, the length of a share, and the number of shares that are not empty."""
    column = s - 1
    if GROWING:
        column = tl.load(last).to(tl.int32)
    first = column * 0
    if STARTED:
        first = tl.maximum(first, tl.load(start + b).to(tl.int32))
    if WINDOWED:
        first = tl.maximum(first, column - T + 2 - window)
    begin = tl.where(column < s, first, 0)
    end = tl.where(column < s, column + 1 - (T if NEW else 0), s)
    blocks = tl.cdiv(tl.maximum(end - begin, 1), BN)
    length = tl.cdiv(blocks, shares)
    return column, first, begin, end, length * BN, tl.cdiv(blocks, length)


@triton.jit
@no_type_check
def _marked(mask, places, there, name, NAMED: tl.constexpr):
    """Returns which places the mask makes visible."""
    marks = tl.load(mask + places, mask=there, other=0)
    if NAMED:
        return there & (marks == name)
    return there & (marks != 0)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _share(q, k, v, new_k, new_v, last, start, mask, document, y, parts, sums, qb, qt, qh, kb, ks, kh, vb, vs, vh, nb, nt,
           nh, wb, wt, wh, mb, s, kv, scale, softcap, window, shares, T: tl.constexpr, GROUP: tl.constexpr,
           GROWING: tl.constexpr, STARTED: tl.constexpr, WINDOWED: tl.constexpr, NEW: tl.constexpr, BN: tl.constexpr,
           P: tl.constexpr, PT: tl.constexpr, ST: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr,
           NAMED: tl.constexpr, CAPPED: tl.constexpr, D: tl.constexpr, DT: tl.constexpr, RT: tl.constexpr,
           NT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    ROWS: tl.constexpr = T * GROUP
    share, pair = tl.program_id(0) % shares, (tl.program_id(0) // shares).to(tl.int64)
    b, head = pair // kv, pair % kv
    column, first, begin, end, length, used = _places_of(
        last, start, b, s, window, shares, T, GROWING, STARTED, WINDOWED, NEW, BN
    )
    if share < used:
        rows = tl.arange(0, RT)
        ok, at = rows < ROWS, rows // GROUP * qt + (head * GROUP + rows % GROUP) * qh
        channels, values = tl.arange(0, DT), tl.arange(0, PT)
        queries = tl.load(q + b * qb + at[:, None] + channels, mask=ok[:, None] & (channels < D)[None, :], other=0.0)
        k += b * kb + head * kh
        v += b * vb + head * vh
        mask += b * mb
        name = 0
        if NAMED:
            name = tl.load(document + b)
        own = column - T + 1 + rows[:, None] // GROUP
        m = tl.full([RT], float("-inf"), tl.float32)
        l = tl.zeros([RT], tl.float32)
        out = tl.zeros([RT, PT], tl.float32)
        if NEW:  # noqa: SIM102 - one is known when the kernel is compiled
            if share == 0:
                token = tl.arange(0, NT)
                there, columns = token < T, column - T + 1 + token
                places = columns % s
                keys = rows_at(new_k + b * nb + head * nh, token, nt, there, D, DT).to(k.dtype.element_ty)
                held = rows_at(new_v + b * wb + head * wh, token, wt, there, P, PT).to(v.dtype.element_ty)
                far = places.to(tl.int64)[:, None]
                tl.store(k + far * ks + channels, keys, mask=there[:, None] & (channels < D)[None, :])
                tl.store(v + far * vs + values, held, mask=there[:, None] & (values < P)[None, :])
                seen = there & (columns >= first)
                if MASKED:
                    seen = _marked(mask, places, seen, name, NAMED)
                seen = seen[None, :] & (columns[None, :] <= own)
                if WINDOWED:
                    seen &= columns[None, :] > own - window
                m, l, out = _attend(
                    queries, keys.to(queries.dtype), held.to(queries.dtype), m, l, out, seen, scale, softcap, True, CAPPED,
                    PREC,
                )  # fmt: skip
        turn = column // s * s
        for j in range(begin + share * length, tl.minimum(begin + (share + 1) * length, end), BN):
            places = j + tl.arange(0, BN)
            there = places < end
            columns = places + turn
            columns = tl.where(columns > column, columns - s, columns)
            seen = there & (columns >= first)
            if NEW:
                seen &= columns <= column - T
            if MASKED:
                seen = _marked(mask, places, seen, name, NAMED)
            seen = seen[None, :]
            if T > 1:
                seen &= columns[None, :] <= own
                if WINDOWED:
                    seen &= columns[None, :] > own - window
            keys, held = rows_at(k, places, ks, there, D, DT), rows_at(v, places, vs, there, P, PT)
            m, l, out = _attend(
                queries, keys.to(queries.dtype), held.to(queries.dtype), m, l, out, seen, scale, softcap, True, CAPPED, PREC
            )
        kept = ok[:, None] & (values < P)[None, :]
        if SHARED and used > 1:
            at = (pair * shares + share) * ROWS + rows
            tl.store(parts + at[:, None] * P + values, out, mask=kept)
            tl.store(sums + at, m, mask=ok)
            tl.store(sums + tl.num_programs(0).to(tl.int64) * ROWS + at, l, mask=ok)
        else:
            out = tl.where(l[:, None] == 0, 0.0, out / tl.where(l == 0, 1.0, l)[:, None])  # sees no key: padding
            at = ((b * T + rows // GROUP) * kv + head) * GROUP + rows % GROUP
            tl.store(y + at[:, None] * P + values, out.to(y.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _join(last, start, parts, sums, y, s, kv, scale, softcap, window, shares, T: tl.constexpr, GROUP: tl.constexpr,
          GROWING: tl.constexpr, STARTED: tl.constexpr, WINDOWED: tl.constexpr, NEW: tl.constexpr, BN: tl.constexpr,
          P: tl.constexpr, PT: tl.constexpr, ST: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """Compute one row's output: the shares' outputs, weighted by their sums."""
    row, pair = tl.program_id(0) % (T * GROUP), (tl.program_id(0) // (T * GROUP)).to(tl.int64)
    used = _places_of(last, start, pair // kv, s, window, shares, T, GROWING, STARTED, WINDOWED, NEW, BN)[5]
    if used > 1:
        share, channels = tl.arange(0, ST), tl.arange(0, PT)
        there = share < used
        at = (pair * shares + share) * T * GROUP + row
        top = tl.load(sums + at, mask=there, other=float("-inf"))
        total = tl.load(sums + tl.num_programs(0).to(tl.int64) * shares + at, mask=there, other=0.0)
        out = tl.load(parts + at[:, None] * P + channels, mask=there[:, None] & (channels < P)[None, :], other=0.0)
        peak = tl.max(top, 0)
        weights = tl.exp2(top - tl.where(peak == float("-inf"), 0.0, peak))
        out, total = tl.sum(out * weights[:, None], 0), tl.sum(total * weights, 0)
        out = tl.where(total == 0, 0.0, out / tl.where(total == 0, 1.0, total))
        y += (((pair // kv * T + row // GROUP) * kv + pair % kv) * GROUP + row % GROUP) * P
        tl.store(y + channels, out.to(y.dtype.element_ty), mask=channels < P)
