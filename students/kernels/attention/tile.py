"""Shared parts of the forward and backward attention kernels: tiles of rows, logits, and the keys that queries see.

b batch    t queries    s keys    query i has the index i + s - t among the keys
"""

from typing import no_type_check

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(2**30)  # an index after every token


@triton.jit
@no_type_check
def rows_at(base, rows, stride, ok, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Load a tile of rows; zeros for rows that do not exist."""
    columns = tl.arange(0, TILE)
    mask = ok[:, None]
    if WIDTH < TILE:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns, mask=mask, other=0.0)


@triton.jit
@no_type_check
def logits_of(left, right, scale, softcap, CAPPED: tl.constexpr, PREC: tl.constexpr):
    """Compute logits in base 2 of two tiles of rows, and the derivative of the soft cap."""
    raw = tl.dot(left, tl.trans(right), input_precision=PREC)
    if CAPPED:
        tanh = 2 * tl.sigmoid(raw * (2 * scale / softcap)) - 1
        return tanh * (softcap * LOG2E), 1 - tanh * tanh
    return raw * (scale * LOG2E), raw


@triton.jit
@no_type_check
def own_document(rows, at, ok, documents, positions, PACKED: tl.constexpr, PLACED: tl.constexpr, FRONT: tl.constexpr):
    """Returns the identity of each query's document, and the index of its first token.

    The identity is that index; with more keys than queries (FRONT) it is the document's id.
    """
    first = tl.zeros_like(rows)
    if PACKED and PLACED:
        first = at - tl.load(positions + at, mask=ok, other=0).to(tl.int32)
    own = first
    if PACKED and FRONT:
        own = tl.load(documents + at, mask=ok, other=0)
    return own, first


@triton.jit
@no_type_check
def near_keys(at, columns, own, documents, positions, stop, window, reach, PACKED: tl.constexpr, WINDOWED: tl.constexpr,
          SINKS: tl.constexpr, NARROW: tl.constexpr, FRONT: tl.constexpr):  # fmt: skip
    """Returns which keys within reach queries see; `at` and `own` are [queries, 1], `columns` [1, keys], or transposed."""
    lag = at - columns
    seen = (lag >= 0) & (columns < stop)
    if WINDOWED:
        close = lag < window
        if NARROW:
            if FRONT:  # noqa: SIM108 - one is compiled
                place = tl.load(positions + columns, mask=columns < stop, other=SINKS)
            else:
                place = columns - own
            close |= (place < SINKS) & (lag < reach)
        seen &= close
    if PACKED:
        if FRONT:
            seen &= own == tl.load(documents + columns, mask=columns < stop, other=0)
        else:
            seen &= columns >= own
    return seen


@triton.jit
@no_type_check
def keys_at(k, v, j, ks, vs, at, own, ok, documents, positions, stop, window, reach, MASKED: tl.constexpr,
            PACKED: tl.constexpr, WINDOWED: tl.constexpr, SINKS: tl.constexpr, NARROW: tl.constexpr, FRONT: tl.constexpr,
            BN: tl.constexpr, D: tl.constexpr, P: tl.constexpr, DT: tl.constexpr, PT: tl.constexpr):  # fmt: skip
    """Load the tile of keys from j on and their values; also returns which of them each query sees, if MASKED."""
    columns = j + tl.arange(0, BN)
    seen = ok
    if MASKED:
        seen = near_keys(
            at[:, None], columns[None, :], own[:, None], documents, positions, stop, window, reach, PACKED, WINDOWED, SINKS,
            NARROW, FRONT,
        )  # fmt: skip
    there = columns < stop
    return rows_at(k, columns, ks, there, D, DT), rows_at(v, columns, vs, there, P, PT), seen


@triton.jit
@no_type_check
def far_sinks(base, begin, documents, positions, s, SINKS: tl.constexpr, FRONT: tl.constexpr, FAR: tl.constexpr):
    """Returns a document's sinks from number `base` on: their indices, which of them exist, and their documents."""
    slots = base + tl.arange(0, FAR)
    places = begin + slots
    there = (slots < SINKS) & (places >= (SINKS if FRONT else 0)) & (places < s)
    theirs = tl.full([FAR], 0, tl.int32) + begin
    if FRONT:
        front = (slots >= SINKS) & (slots < 2 * SINKS)
        places = tl.where(front, slots - SINKS, places)
        there |= front & (places < s)
        there &= tl.load(positions + places, mask=there, other=SINKS) < SINKS
        theirs = tl.load(documents + places, mask=there, other=0)
    return places, there, theirs


@triton.jit
@no_type_check
def span_of(z, ok, first, t, s, window, reach, BM: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr,
            PLACED: tl.constexpr, WINDOWED: tl.constexpr, FRONT: tl.constexpr, SEARCHED: tl.constexpr):  # fmt: skip
    """Returns a block's range of keys: its document's start, the first key, the keys that all see (from, to), the end."""
    at = z * BM + s - t
    stop = tl.minimum(z * BM + BM, t) + s - t
    begin, last = 0, 0
    if PACKED and PLACED:
        begin = tl.min(tl.where(ok, first, NEVER), 0)
        last = tl.max(tl.where(ok, first, begin), 0)
    start = at * 0
    if not FRONT:
        start = tl.maximum(begin, start)
    whole = start
    if WINDOWED:
        start = tl.maximum(start, at - reach + 1)
        whole = tl.maximum(start, at + BM - window)
    inner, outer = start, start
    if SEARCHED and not FRONT:  # noqa: SIM102 - one is known when the kernel is compiled
        if begin == last:
            inner = start + tl.cdiv(whole - start, BN) * BN
            outer = inner + tl.maximum(at + 1 - inner, 0) // BN * BN
    return begin, start, inner, outer, stop
