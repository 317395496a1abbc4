"""The one-token step of attention over a ring in Triton: one launch, one program per head.

Heads that share a key head all rotate the same key and write it to the same place. The ring has one place more than the
window, so that all of them can still read the token that leaves it.
"""

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels import launch
from students.kernels.window_token import Keys, Norms

KINDS = {None: 0, "half": 1, "pairs": 2}  # kinds of rotary embedding


def window_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Keys,
    column: Tensor,
    dtype: torch.dtype,
    scale: float,
    softcap: float | None,
    rope: tuple[Tensor, Tensor, str] | None,
    norms: Norms | None,
    factors: Tensor | None,
    reads: Sequence[int] | None,
    share: Tensor | None = None,
) -> Tensor:
    """See `students.kernels.window_token.window_token`."""
    batch, heads, width = q.shape
    size, key_heads = keys.k.shape[1:3]
    q, k, v = (launch.rows_of(part) for part in (q, k, v))
    y = torch.empty((batch, heads, width), dtype=dtype, device=q.device)
    cos, sin, kind = rope if rope is not None else (q, q, None)
    cos, sin = launch.rows_of(cos), launch.rows_of(sin)
    sinks = keys.sinks if keys.sinks is not None else (keys.k, keys.v)
    count = sinks[0].shape[1] if keys.sinks is not None else 0
    block = triton.next_power_of_2(size)
    with launch.on(q):
        _token[(heads, batch)](
            q, k, v, keys.k, keys.v, *sinks, keys.offset, column, y, cos, sin,
            norms.q.contiguous() if norms else q, norms.k.contiguous() if norms else q,
            factors if factors is not None else q, q if share is None else launch.rows_of(share),
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            cos.stride(0) if cos.shape[0] > 1 else 0, sin.stride(0) if sin.shape[0] > 1 else 0, heads, key_heads, size,
            size if keys.window is None else keys.window, scale, softcap or 0.0, norms.eps if norms else 0.0, width,
            cos.shape[-1] if kind else 0, count, 0 if share is None else share.stride(0), KIND=KINDS[kind],
            NORM=norms is not None, FACTORS=factors is not None, SHARE=share is not None,
            CAP=softcap is not None, SINKS=triton.next_power_of_2(count) if count else 0, BS=block,
            BP=triton.next_power_of_2(width), num_warps=4 if block * width <= 8192 else 8,
        )  # fmt: skip
    return y


# Kernels. `no_type_check` excludes them from the tests' shape checker, which cannot read them.


@triton.jit
@no_type_check
def _turned(x, norm, cos, sin, p, P, R, eps, KIND: tl.constexpr, NORM: tl.constexpr):
    """Load one head's channels, normalise and rotate them, in float32."""
    v = tl.load(x + p, mask=p < P, other=0.0).to(tl.float32)
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(v * v, 0) / P + eps)
        v = v * factor * tl.load(norm + p, mask=p < P, other=0.0).to(tl.float32)
    if KIND != 0:
        if KIND == 1:
            other = tl.where(p < R // 2, p + R // 2, p - R // 2)
            sign = tl.where(p < R // 2, -1.0, 1.0)
        else:
            other = p + 1 - 2 * (p % 2)
            sign = tl.where(p % 2 == 0, -1.0, 1.0)
        across = tl.load(x + other, mask=p < R, other=0.0).to(tl.float32)
        if NORM:
            across = across * factor * tl.load(norm + other, mask=p < R, other=0.0).to(tl.float32)
        c = tl.load(cos + p, mask=p < R, other=1.0).to(tl.float32)
        s = tl.load(sin + p, mask=p < R, other=0.0).to(tl.float32)
        v = v * c + across * sign * s
    return v


@triton.jit
@no_type_check
def _token(
    q, k, v, ring_k, ring_v, sink_k, sink_v, offset, column, y, cos, sin, norm_q, norm_k, factors, share,
    sqb, sqh, skb, skh, svb, svh, scb, ssb, H, KV, S, window, scale, softcap, eps, P, R, sinks, shb,
    KIND: tl.constexpr, NORM: tl.constexpr, FACTORS: tl.constexpr, SHARE: tl.constexpr, CAP: tl.constexpr,
    SINKS: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    kv = h // (H // KV)
    p = tl.arange(0, BP)
    s = tl.arange(0, BS)
    at = tl.load(column)
    position = tl.load(offset + b) + at
    u = _turned(q + b * sqb + h * sqh, norm_q + h * P, cos + b * scb, sin + b * ssb, p, P, R, eps, KIND, NORM)
    new_k = _turned(k + b * skb + kv * skh, norm_k + kv * P, cos + b * scb, sin + b * ssb, p, P, R, eps, KIND, NORM)
    new_v = tl.load(v + b * svb + kv * svh + p, mask=p < P, other=0.0).to(tl.float32)
    new_k = new_k.to(ring_k.dtype.element_ty).to(tl.float32)
    new_v = new_v.to(ring_v.dtype.element_ty).to(tl.float32)

    age = (at - s) % S
    age = tl.where(age < 0, age + S, age)
    inside = (s < S)[:, None] & (p < P)[None, :]
    place = ((b * S + s) * KV + kv)[:, None] * P + p[None, :]
    keys = tl.load(ring_k + place, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(ring_v + place, mask=inside, other=0.0).to(tl.float32)
    leaving = (b * S + (at + 1) % S) * KV * P + kv * P + p
    gone_k = tl.load(ring_k + leaving, mask=p < P, other=0.0)
    gone_v = tl.load(ring_v + leaving, mask=p < P, other=0.0)
    own = (age == 0)[:, None]
    keys = tl.where(own, new_k[None, :], keys)
    values = tl.where(own, new_v[None, :], values)
    logits = tl.sum(keys * u[None, :], 1) * scale
    if CAP:
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
    visible = (s < S) & (age < window) & (position - age >= 0)
    logits = tl.where(visible, logits, float("-inf"))
    most = tl.max(logits, 0)
    if SINKS > 0:
        i = tl.arange(0, SINKS)
        there = (i < sinks)[:, None] & (p < P)[None, :]
        sink = ((b * sinks + i) * KV + kv)[:, None] * P + p[None, :]
        first_k = tl.load(sink_k + sink, mask=there, other=0.0)
        first_v = tl.load(sink_v + sink, mask=there, other=0.0)
        comes = (i == position - window)[:, None] & there
        first_k = tl.where(comes, gone_k[None, :], first_k)
        first_v = tl.where(comes, gone_v[None, :], first_v)
        tl.store(sink_k + sink, first_k, mask=comes)
        tl.store(sink_v + sink, first_v, mask=comes)
        far = tl.sum(first_k.to(tl.float32) * u[None, :], 1) * scale
        if CAP:
            far = softcap * (2.0 * tl.sigmoid(2.0 * far / softcap) - 1.0)
        far = tl.where((i < sinks) & (i <= position - window), far, float("-inf"))
        most = tl.maximum(most, tl.max(far, 0))
    weights = tl.exp(logits - most)
    total = tl.sum(weights, 0)
    out = tl.sum(weights[:, None] * values, 0)
    if SINKS > 0:
        far = tl.exp(far - most)
        total += tl.sum(far, 0)
        out += tl.sum(far[:, None] * first_v.to(tl.float32), 0)
    out = out / total
    if FACTORS:
        out = out * tl.load(factors + h).to(tl.float32)
    if SHARE:
        out = out * (2.0 * tl.sigmoid(-tl.load(share + b * shb + h).to(tl.float32)))
    written = (b * S + at % S) * KV * P + kv * P + p
    tl.store(ring_k + written, new_k.to(ring_k.dtype.element_ty), mask=p < P)
    tl.store(ring_v + written, new_v.to(ring_v.dtype.element_ty), mask=p < P)
    tl.store(y + (b * H + h) * P + p, out.to(y.dtype.element_ty), mask=p < P)
