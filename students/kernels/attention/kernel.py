"""Softmax attention in Triton, forward and backward, for windows, sinks and documents: O(t) extra memory, no mask in memory.

Forward: a program computes attention for a block of queries (FlashAttention-2, arXiv 2307.08691). It reads keys from the
start of its first query's window or document, whichever is later, up to its last query. Masks are made in registers and left
out for keys that all queries of the block see. A document is identified by the index of its first token. Only the sinks of
the block's first document can lie further back; they are one more tile. Documents that begin later in the block have their
sinks within reach, which is the window or a block, whichever is longer. With more keys than queries (a cache), sinks may
also be at the first indices, and documents are compared by id.

Backward: one kernel goes over the keys of a block of queries, another over the queries of a block of keys. All later blocks
of a document read its sinks, so the first kernel writes each block's contribution to its sinks, and a third kernel sums
these. Every sum has a fixed order, so results are bitwise reproducible. No accumulator of a product is transposed in
registers, which Triton 3.4 to 3.7 compile wrongly on Hopper; a transposed result is computed as another product.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from students.kernels import launch
from students.kernels.attention.tile import NEVER, far_sinks, keys_at, logits_of, near_keys, own_document, rows_at, span_of
from students.kernels.documents import positions as count_positions

SIZES = ["t", "s", "window", "reach", "blocks"]  # they vary, so no kernels are specialised for 1 and multiples of 16
SEARCHED = 4  # from this number of key blocks in a window, document bounds limit the loops over keys and queries


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


class Config(NamedTuple):
    """The tiles of the forward pass, of the queries' gradient and of the keys' gradient."""

    forward: Tiles
    queries: Tiles
    keys: Tiles


# By the widest head that each serves: the default first. For more than LONG keys the last is the default. Tests compare all
# with float64 on a GPU.
CONFIGS_16 = {
    64: [
        Config(Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 1)),
        Config(Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 1)),
    ],
    128: [Config(Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2))],
    256: [Config(Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 1), Tiles(32, 64, 8, 1))],
}
CONFIGS_32 = {  # 4-byte inputs
    64: [Config(Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 2))],
    128: [Config(Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1))],
    256: [Config(Tiles(32, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1))],
}
LONG = 256  # keys


def configs(dtype: torch.dtype, width: int, window: int | None) -> list[Config]:
    """Returns the shipped configurations for heads of this width, the default first."""
    table = CONFIGS_16 if dtype.itemsize == 2 else CONFIGS_32
    choices = next(choices for widest, choices in table.items() if width <= widest)
    return choices[::-1] if window is None or window >= LONG else choices


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: int,
    documents: Tensor | None,
    positions: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """See `students.kernels.attention.attention`. Tests and benchmarks may set the configuration."""
    config = config or configs(q.dtype, max(q.shape[3], v.shape[3]), window)[0]
    sinks = 0 if window is None else sinks
    keys = k.shape[1]
    if documents is None:  # positions are not used without documents
        positions = None
    else:
        documents = documents.expand(q.shape[0], keys).contiguous()
        if positions is None and keys == q.shape[1]:
            positions = count_positions(documents)
        positions = None if positions is None else positions.expand(q.shape[0], keys).contiguous()
    return _Attention.apply(q, k, v, documents, positions, scale, softcap, window, sinks, config)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, documents, positions, scale, softcap, window, sinks, config):
        q, k, v = (launch.rows_of(part) for part in (q, k, v))
        batch, time, heads, _ = q.shape
        y = torch.empty((batch, time, heads, v.shape[3]), dtype=v.dtype, device=q.device)
        lse = torch.empty((batch, heads, time), dtype=torch.float32, device=q.device)
        tiles = config.forward
        sizes, options = _launched(q, k, v, documents, positions, scale, softcap, window, sinks, tiles)
        with launch.on(q):
            _forward[(triton.cdiv(time, tiles.queries) * batch * heads,)](
                q, k, v, *_places(documents, positions, q), y, lse, *_strides(q, k, v, y), *sizes, **options
            )
        ctx.save_for_backward(q, k, v, y, lse, documents, positions)
        ctx.options = scale, softcap, window, sinks, config
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, y, lse, documents, positions = ctx.saved_tensors
        scale, softcap, window, sinks, config = ctx.options
        dy = launch.rows_of(dy.to(y.dtype))
        dq, dk, dv = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (q, k, v))
        delta = torch.empty_like(lse)
        batch, time, heads, width = q.shape
        kv, values, keys = k.shape[2], v.shape[3], k.shape[1]
        blocks, rows = triton.cdiv(time, config.queries.queries), sinks * (2 if keys > time else 1)
        added = torch.empty((batch, heads, blocks, rows, width + values), dtype=torch.float32, device=q.device)
        begins = torch.empty((batch, blocks), dtype=torch.int32, device=q.device)
        given = q, k, v, documents, positions, scale, softcap, window, sinks
        places, strides = _places(documents, positions, q), _strides(q, k, v, y, dy)
        with launch.on(q):
            sizes, options = _launched(*given, config.queries)
            _backward_queries[(blocks * batch * heads,)](
                q, k, v, *places, y, dy, lse, delta, dq, added, begins, *strides, *sizes, blocks, **options
            )
            sizes, options = _launched(*given, config.keys, reach=config.queries.queries)
            found = _bounds(positions, config.keys.keys, time, keys) if options["SEARCHED"] else None
            _backward_keys[(triton.cdiv(keys, config.keys.keys) * batch * kv,)](
                q, k, v, *places, dy, lse, delta, dk, dv, q if found is None else found, *strides, *sizes,
                BOUNDED=found is not None, **options,
            )  # fmt: skip
            if rows:
                _backward_sinks[(blocks * batch * kv, rows)](
                    added, begins, places[1], dk, dv, time, keys, sizes[-1], blocks, heads, kv, SINKS=sinks, ROWS=rows,
                    BM=config.queries.queries, GROUP=heads // kv, D=width, P=values, DT=launch.tile(width),
                    PT=launch.tile(values), num_warps=4,
                )  # fmt: skip
        return dq, dk, dv, *(None,) * 7


def _places(documents: Tensor | None, positions: Tensor | None, absent: Tensor) -> tuple[Tensor, Tensor]:
    """Returns documents and positions; `absent`, a tensor that is never read, stands in for a missing one."""
    return absent if documents is None else documents, absent if positions is None else positions


def _strides(*parts: Tensor) -> list[int]:
    return [stride for part in parts for stride in part.stride()[:3]]


def _launched(q, k, v, documents, positions, scale, softcap, window, sinks, tiles: Tiles, reach: int | None = None):
    """Returns the sizes and options of a launch. reach: queries of the tile that decides which sinks are far, if it is not
    this kernel's."""
    time, keys, width, values = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    reach = tiles.queries if reach is None else reach
    searched = window is None or window >= SEARCHED * tiles.keys
    most = NEVER.value if window is None else min(window, NEVER.value)
    sizes = time, keys, q.shape[2], scale, softcap or 1.0, most, max(most, reach)
    options = {
        "GROUP": q.shape[2] // k.shape[2], "PACKED": documents is not None, "PLACED": positions is not None,
        "WINDOWED": window is not None, "SINKS": sinks, "NARROW": bool(sinks) and window < reach, "FRONT": keys > time,
        "CAPPED": softcap is not None, "SEARCHED": searched, "BM": tiles.queries, "BN": tiles.keys,
        "FAR": _sink_tile(q, v, sinks, keys > time), "D": width, "P": values, "DT": launch.tile(width),
        "PT": launch.tile(values),
        "PREC": launch.precision(q.dtype), "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    return sizes, options


def _sink_tile(q, v, sinks: int, front: bool) -> int:
    """Returns the sinks of a tile: as many as fit in shared memory next to the tiles of queries and keys."""
    most = 64 if q.dtype.itemsize == 2 else 64 * 64 // max(64, launch.tile(max(q.shape[3], v.shape[3])))
    return launch.tile(min(2 * sinks if front else sinks, most))


def _bounds(positions: Tensor | None, block: int, time: int, keys: int) -> Tensor | None:
    """Returns, for each block of keys, how many queries precede the end of its last key's document and its first key's."""
    if positions is None or keys > time:
        return None
    first = torch.arange(time, device=positions.device) - positions
    starts = torch.arange(0, time, block, device=positions.device)
    wanted = torch.cat([(starts + block - 1).clamp(max=time - 1), starts]).expand(positions.shape[0], -1).contiguous()
    return torch.searchsorted(first, wanted, right=True).to(torch.int32)


# Kernels. `no_type_check` excludes them from the tests' shape checker, which cannot read them.


@triton.jit
@no_type_check
def _attend(q, k, v, m, l, y, seen, scale, softcap, MASKED: tl.constexpr, CAPPED: tl.constexpr, PREC: tl.constexpr):
    """Update the running maximum, sum and output of the softmax with one tile of keys."""
    logits, _ = logits_of(q, k, scale, softcap, CAPPED, PREC)
    if MASKED:
        logits = tl.where(seen, logits, float("-inf"))
    top = tl.maximum(m, tl.max(logits, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(logits - safe[:, None])
    shrink = tl.exp2(m - safe)
    y = tl.dot(weights.to(v.dtype), v, y * shrink[:, None], input_precision=PREC)
    return top, l * shrink + tl.sum(weights, 1), y


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _forward(q, k, v, documents, positions, y, lse, qb, qt, qh, kb, ks, kh, vb, vs, vh, yb, yt, yh, t, s, heads, scale,
             softcap, window, reach, GROUP: tl.constexpr, PACKED: tl.constexpr, PLACED: tl.constexpr, WINDOWED: tl.constexpr,
             SINKS: tl.constexpr, NARROW: tl.constexpr, FRONT: tl.constexpr, CAPPED: tl.constexpr, SEARCHED: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, FAR: tl.constexpr, D: tl.constexpr, P: tl.constexpr, DT: tl.constexpr,
             PT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    ROWS: tl.constexpr = 2 * SINKS if FRONT else SINKS
    blocks = tl.cdiv(t, BM)
    z, pair = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, head = pair // heads, pair % heads
    k += b * kb + head // GROUP * kh
    v += b * vb + head // GROUP * vh
    documents += b * s
    positions += b * s
    rows = z * BM + tl.arange(0, BM)
    at, ok = rows + s - t, rows < t
    own, first = own_document(rows, at, ok, documents, positions, PACKED, PLACED, FRONT)
    queries = rows_at(q + b * qb + head * qh, rows, qt, ok, D, DT)
    begin, start, inner, outer, stop = span_of(
        z, ok, first, t, s, window, reach, BM, BN, PACKED, PLACED, WINDOWED, FRONT, SEARCHED
    )
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, PT], tl.float32)
    if SINKS > 0:  # noqa: SIM102 - one is known when the kernel is compiled
        if stop > reach:
            for base in tl.range(0, ROWS, FAR, num_stages=1):
                places, there, theirs = far_sinks(base, begin, documents, positions, s, SINKS, FRONT, FAR)
                far = there[None, :] & (at[:, None] - places[None, :] >= reach) & (own[:, None] == theirs[None, :])
                sinks, sunk = rows_at(k, places, ks, there, D, DT), rows_at(v, places, vs, there, P, PT)
                m, l, out = _attend(queries, sinks, sunk, m, l, out, far, scale, softcap, True, CAPPED, PREC)
    for section in tl.static_range(0 if SEARCHED else 2, 3):  # masked, seen by all, masked
        first = start if section == 0 else inner if section == 1 else outer
        last = tl.minimum(inner, stop) if section == 0 else outer if section == 1 else stop
        for j in range(first, last, BN):
            keys, values, seen = keys_at(
                k, v, j, ks, vs, at, own, ok, documents, positions, stop, window, reach, section != 1, PACKED, WINDOWED,
                SINKS, NARROW, FRONT, BN, D, P, DT, PT,
            )  # fmt: skip
            m, l, out = _attend(queries, keys, values, m, l, out, seen, scale, softcap, section != 1, CAPPED, PREC)
    empty = l == 0  # a query that sees no key: padding
    out = tl.where(empty[:, None], 0.0, out / tl.where(empty, 1.0, l)[:, None])
    channels = tl.arange(0, PT)
    y += b * yb + head * yh
    tl.store(y + rows.to(tl.int64)[:, None] * yt + channels, out.to(y.dtype.element_ty), mask=ok[:, None] & (channels < P))
    tl.store(lse + pair * t + rows, tl.where(empty, 0.0, m + tl.log2(tl.where(empty, 1.0, l))), mask=ok)


@triton.jit
@no_type_check
def _query_step(queries, k, v, dy, lse, delta, dq, seen, scale, softcap, MASKED: tl.constexpr, CAPPED: tl.constexpr,
                PREC: tl.constexpr):  # fmt: skip
    """Add a tile of keys to the gradient of the queries (divided by the scale)."""
    logits, slope = logits_of(queries, k, scale, softcap, CAPPED, PREC)
    weights = tl.exp2(logits - lse[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    change = weights * (tl.dot(dy, tl.trans(v), input_precision=PREC) - delta[:, None])
    if CAPPED:
        change *= slope
    return tl.dot(change.to(k.dtype), k, dq, input_precision=PREC)


@triton.jit
@no_type_check
def _key_step(keys, values, q, dy, lse, delta, dk, dv, seen, scale, softcap, MASKED: tl.constexpr, CAPPED: tl.constexpr,
              PREC: tl.constexpr):  # fmt: skip
    """Add a tile of queries to the gradients of keys (divided by the scale) and values; seen: [keys, queries]."""
    logits, slope = logits_of(keys, q, scale, softcap, CAPPED, PREC)
    weights = tl.exp2(logits - lse[None, :])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    dv = tl.dot(weights.to(dy.dtype), dy, dv, input_precision=PREC)
    change = weights * (tl.dot(values, tl.trans(dy), input_precision=PREC) - delta[None, :])
    if CAPPED:
        change *= slope
    return tl.dot(change.to(q.dtype), q, dk, input_precision=PREC), dv


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _backward_queries(q, k, v, documents, positions, y, dy, lse, delta, dq, added, begins, qb, qt, qh, kb, ks, kh, vb, vs,
                      vh, yb, yt, yh, gb, gt, gh, t, s, heads, scale, softcap, window, reach, blocks, GROUP: tl.constexpr,
                      PACKED: tl.constexpr, PLACED: tl.constexpr, WINDOWED: tl.constexpr, SINKS: tl.constexpr,
                      NARROW: tl.constexpr, FRONT: tl.constexpr, CAPPED: tl.constexpr, SEARCHED: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr, FAR: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
                      DT: tl.constexpr, PT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    ROWS: tl.constexpr = 2 * SINKS if FRONT else SINKS
    z, pair = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, head = pair // heads, pair % heads
    k += b * kb + head // GROUP * kh
    v += b * vb + head // GROUP * vh
    documents += b * s
    positions += b * s
    rows = z * BM + tl.arange(0, BM)
    at, ok = rows + s - t, rows < t
    own, first = own_document(rows, at, ok, documents, positions, PACKED, PLACED, FRONT)
    queries = rows_at(q + b * qb + head * qh, rows, qt, ok, D, DT)
    dout = rows_at(dy + b * gb + head * gh, rows, gt, ok, P, PT)
    out = rows_at(y + b * yb + head * yh, rows, yt, ok, P, PT)
    total = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta + pair * t + rows, total, mask=ok)
    sums = tl.load(lse + pair * t + rows, mask=ok, other=0.0)
    begin, start, inner, outer, stop = span_of(
        z, ok, first, t, s, window, reach, BM, BN, PACKED, PLACED, WINDOWED, FRONT, SEARCHED
    )
    grad = tl.zeros([BM, DT], tl.float32)
    if SINKS > 0:
        if head == 0:
            tl.store(begins + b * blocks + z, begin)
        if stop > reach:
            added += (pair * blocks + z) * ROWS * (D + P)
            wide, deep = tl.arange(0, DT)[None, :], tl.arange(0, PT)[None, :]
            for base in tl.range(0, ROWS, FAR, num_stages=1):
                places, there, theirs = far_sinks(base, begin, documents, positions, s, SINKS, FRONT, FAR)
                far = there[None, :] & (at[:, None] - places[None, :] >= reach) & (own[:, None] == theirs[None, :])
                sinks, sunk = rows_at(k, places, ks, there, D, DT), rows_at(v, places, vs, there, P, PT)
                grad = _query_step(queries, sinks, sunk, dout, sums, total, grad, far, scale, softcap, True, CAPPED, PREC)
                far = there[:, None] & (at[None, :] - places[:, None] >= reach) & (theirs[:, None] == own[None, :])
                dk, dv = tl.zeros([FAR, DT], tl.float32), tl.zeros([FAR, PT], tl.float32)
                dk, dv = _key_step(sinks, sunk, queries, dout, sums, total, dk, dv, far, scale, softcap, True, CAPPED, PREC)
                slots = base + tl.arange(0, FAR)
                line = added + slots[:, None] * (D + P)
                tl.store(line + wide, dk * scale, mask=(slots < ROWS)[:, None] & (wide < D))
                tl.store(line + D + deep, dv, mask=(slots < ROWS)[:, None] & (deep < P))
    for section in tl.static_range(0 if SEARCHED else 2, 3):
        first = start if section == 0 else inner if section == 1 else outer
        last = tl.minimum(inner, stop) if section == 0 else outer if section == 1 else stop
        for j in range(first, last, BN):
            keys, values, seen = keys_at(
                k, v, j, ks, vs, at, own, ok, documents, positions, stop, window, reach, section != 1, PACKED, WINDOWED,
                SINKS, NARROW, FRONT, BN, D, P, DT, PT,
            )  # fmt: skip
            grad = _query_step(
                queries, keys, values, dout, sums, total, grad, seen, scale, softcap, section != 1, CAPPED, PREC
            )
    channels = tl.arange(0, DT)
    place = dq + (b * t + rows.to(tl.int64))[:, None] * (heads * D) + head * D + channels
    tl.store(place, (grad * scale).to(dq.dtype.element_ty), mask=ok[:, None] & (channels < D))


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _backward_keys(q, k, v, documents, positions, dy, lse, delta, dk, dv, bounds, qb, qt, qh, kb, ks, kh, vb, vs, vh, yb, yt,
                   yh, gb, gt, gh, t, s, heads, scale, softcap, window, reach, BOUNDED: tl.constexpr, GROUP: tl.constexpr,
                   PACKED: tl.constexpr, PLACED: tl.constexpr, WINDOWED: tl.constexpr, SINKS: tl.constexpr,
                   NARROW: tl.constexpr, FRONT: tl.constexpr, CAPPED: tl.constexpr, SEARCHED: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, FAR: tl.constexpr, D: tl.constexpr, P: tl.constexpr, DT: tl.constexpr, PT: tl.constexpr,
                   PREC: tl.constexpr):  # fmt: skip
    count = tl.cdiv(s, BN)
    n, pair = tl.program_id(0) % count, (tl.program_id(0) // count).to(tl.int64)
    kv = heads // GROUP
    b, head = pair // kv, pair % kv
    documents += b * s
    positions += b * s
    columns = n * BN + tl.arange(0, BN)
    there = columns < s
    keys = rows_at(k + b * kb + head * kh, columns, ks, there, D, DT)
    values = rows_at(v + b * vb + head * vh, columns, vs, there, P, PT)
    begin = tl.maximum(n * BN - (s - t), 0)
    end = tl.minimum(t, n * BN + BN - 1 + tl.minimum(reach, NEVER) - (s - t)) if WINDOWED else t
    whole = end
    if BOUNDED:
        end = tl.minimum(end, tl.load(bounds + (b * 2) * count + n))
        whole = tl.load(bounds + (b * 2 + 1) * count + n)
    end = tl.maximum(end, begin)
    steps = tl.cdiv(end - begin, BM)
    inner, outer = 0, 0  # steps whose queries see all keys of the block
    if SEARCHED and (not FRONT):
        if WINDOWED:
            whole = tl.minimum(whole, n * BN + window)
        inner = tl.cdiv(BN - 1, BM)
        outer = tl.maximum(tl.minimum(whole, t) - begin, 0) // BM
        inner, outer = tl.minimum(inner, steps), tl.minimum(tl.maximum(outer, inner), steps)
    grad, vgrad = tl.zeros([BN, DT], tl.float32), tl.zeros([BN, PT], tl.float32)
    for turn in range(0, GROUP if SEARCHED else 1):  # short loops take all heads of the group together
        for section in tl.static_range(0 if SEARCHED else 2, 3):
            first = 0 if section == 0 else inner if section == 1 else outer
            last = inner if section == 0 else outer if section == 1 else steps if SEARCHED else steps * GROUP
            for step in range(first, last):
                group = head * GROUP + (turn if SEARCHED else step // steps)
                rows = begin + (step if SEARCHED else step % steps) * BM + tl.arange(0, BM)
                ok = rows < end
                queries = rows_at(q + b * qb + group * qh, rows, qt, ok, D, DT)
                dout = rows_at(dy + b * gb + group * gh, rows, gt, ok, P, PT)
                line = (b * heads + group) * t + rows
                sums, total = tl.load(lse + line, mask=ok, other=0.0), tl.load(delta + line, mask=ok, other=0.0)
                seen = ok
                if section != 1:
                    at = rows + s - t
                    own, _ = own_document(rows, at, ok, documents, positions, PACKED, PLACED, FRONT)
                    seen = ok[None, :] & near_keys(
                        at[None, :], columns[:, None], own[None, :], documents, positions, s, window, reach, PACKED,
                        WINDOWED, SINKS, NARROW, FRONT,
                    )  # fmt: skip
                grad, vgrad = _key_step(
                    keys, values, queries, dout, sums, total, grad, vgrad, seen, scale, softcap, section != 1, CAPPED, PREC
                )
    wide, deep = tl.arange(0, DT), tl.arange(0, PT)
    line = (b * s + columns.to(tl.int64))[:, None] * kv + head
    tl.store(dk + line * D + wide, (grad * scale).to(dk.dtype.element_ty), mask=there[:, None] & (wide < D))
    tl.store(dv + line * P + deep, vgrad.to(dv.dtype.element_ty), mask=there[:, None] & (deep < P))


@triton.jit(do_not_specialize=["t", "s", "reach", "blocks"])
@no_type_check
def _backward_sinks(added, begins, positions, dk, dv, t, s, reach, blocks, heads, kv, SINKS: tl.constexpr,
                    ROWS: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
                    DT: tl.constexpr, PT: tl.constexpr):  # fmt: skip
    """Add to one sink the contributions of all blocks of queries of its document; the first of these blocks does it."""
    z, pair, slot = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    b, head = pair // kv, pair % kv
    begins += b * blocks
    begin = tl.load(begins + z)
    place = tl.where(slot < SINKS, begin + slot, slot - SINKS)
    least = SINKS if ROWS > SINKS else 0
    mine = z == 0
    if slot < SINKS:
        if z > 0:
            mine = tl.load(begins + z - 1) != begin
        mine = mine & (place >= least) & (place < s)
        mine = mine & (tl.load(positions + b * s + place, mask=mine, other=-1) == slot)
    mine = mine & (place < s)
    if mine:
        wide, deep = tl.arange(0, DT), tl.arange(0, PT)
        grad, vgrad = tl.zeros([DT], tl.float32), tl.zeros([PT], tl.float32)
        for group in tl.static_range(0, GROUP):
            for first in range(z, blocks, 32):
                at = first + tl.arange(0, 32)
                ok = (at < blocks) & (tl.minimum(at * BM + BM, t) + s - t > reach)  # earlier blocks have no far sinks
                if slot < SINKS:
                    ok = ok & (tl.load(begins + at, mask=ok, other=0) == begin)
                line = (((b * heads + head * GROUP + group) * blocks + at) * ROWS + slot)[:, None] * (D + P)
                grad += tl.sum(tl.load(added + line + wide, mask=ok[:, None] & (wide < D), other=0.0), 0)
                vgrad += tl.sum(tl.load(added + line + D + deep, mask=ok[:, None] & (deep < P), other=0.0), 0)
        line = (b * s + place) * kv + head
        old = tl.load(dk + line * D + wide, mask=wide < D, other=0.0).to(tl.float32)
        tl.store(dk + line * D + wide, (old + grad).to(dk.dtype.element_ty), mask=wide < D)
        old = tl.load(dv + line * P + deep, mask=deep < P, other=0.0).to(tl.float32)
        tl.store(dv + line * P + deep, (old + vgrad).to(dv.dtype.element_ty), mask=deep < P)
