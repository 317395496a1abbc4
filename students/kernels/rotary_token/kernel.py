"""One-token norms and rotary embedding of q and k in Triton: one launch, one program per head of q, k and v."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels import launch
from students.kernels.rotary_token import Places


def rotary_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor],
    places: Places,
    norms: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """See `students.kernels.rotary_token.rotary_token`."""
    (batch, heads, width), key_heads = q.shape, k.shape[1]
    q, k, v = (launch.rows_of(part) for part in (q, k, v))
    cos, sin = (launch.rows_of(table) for table in tables)
    out = torch.empty((batch, heads, 1, width), dtype=places.keys.dtype, device=q.device)
    norm_q, norm_k, eps = norms if norms is not None else (q, q, 0.0)
    keys, values = places.keys, places.values
    with launch.on(q):
        _token[(heads + 2 * key_heads, batch)](
            q, k, v, cos, sin, norm_q, norm_k, out, keys, values, places.place,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            cos.stride(0) if cos.shape[0] > 1 else 0, sin.stride(0) if sin.shape[0] > 1 else 0,
            keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
            heads, key_heads, width, cos.shape[-1], eps, NORM=norms is not None, BP=triton.next_power_of_2(width),
            num_warps=1,
        )  # fmt: skip
    return out


# Kernels. `no_type_check` excludes them from the tests' shape checker, which cannot read them.


@triton.jit
@no_type_check
def _turned(x, norm, cos, sin, p, P, R, eps, NORM: tl.constexpr):
    v = tl.load(x + p, mask=p < P, other=0.0).to(tl.float32)
    other = tl.where(p < R // 2, p + R // 2, p - R // 2)
    across = tl.load(x + other, mask=p < R, other=0.0).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(v * v, 0) / P + eps)
        v = v * factor * tl.load(norm + p, mask=p < P, other=0.0).to(tl.float32)
        across = across * factor * tl.load(norm + other, mask=p < R, other=0.0).to(tl.float32)
    c = tl.load(cos + p, mask=p < R, other=1.0).to(tl.float32)
    s = tl.load(sin + p, mask=p < R, other=0.0).to(tl.float32)
    return v * c + tl.where(p < R // 2, -across, across) * s


@triton.jit
@no_type_check
def _token(
    q, k, v, cos, sin, norm_q, norm_k, out, keys, values, place, sqb, sqh, skb, skh, svb, svh, scb, ssb,
    tkb, tkh, tks, tvb, tvh, tvs, H, KV, P, R, eps, NORM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    p = tl.arange(0, BP)
    at = tl.load(place).to(tl.int64)
    cos += b * scb
    sin += b * ssb
    if h < H:
        y = _turned(q + b * sqb + h * sqh, norm_q, cos, sin, p, P, R, eps, NORM)
        tl.store(out + (b * H + h) * P + p, y.to(out.dtype.element_ty), mask=p < P)
    elif h < H + KV:
        h -= H
        y = _turned(k + b * skb + h * skh, norm_k, cos, sin, p, P, R, eps, NORM)
        tl.store(keys + b * tkb + h * tkh + at * tks + p, y.to(keys.dtype.element_ty), mask=p < P)
    else:
        h -= H + KV
        y = tl.load(v + b * svb + h * svh + p, mask=p < P, other=0.0).to(tl.float32)  # one type in all branches
        tl.store(values + b * tvb + h * tvh + at * tvs + p, y.to(values.dtype.element_ty), mask=p < P)
