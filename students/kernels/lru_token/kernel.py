"""The one-token step of an RG-LRU layer in Triton: one launch, one program for some channels of a head."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels import launch
from students.kernels.lru_token import BlockGate
from students.kernels.ssm_token.kernel import _softplus

ELEMENTS = 2048  # elements of a gate's block in one program


def lru_token(
    x: Tensor, u: Tensor, admits: BlockGate, keeps: BlockGate, strength: Tensor, c: float, state: Tensor, dtype: torch.dtype
) -> Tensor:
    """See `students.kernels.lru_token.lru_token`."""
    (heads, width), batch = admits.bias.shape, len(x)
    x, u = launch.rows_of(x), launch.rows_of(u)
    gates = [part.contiguous() for part in (*admits, *keeps)]
    y = torch.empty((batch, heads * width), dtype=dtype, device=x.device)
    tile = triton.next_power_of_2(width)
    block = max(1, min(tile, ELEMENTS // tile))
    with launch.on(x):
        _token[(triton.cdiv(width, block) * heads, batch)](
            x, u, *gates, strength, state, y, c, heads * width, width, x.stride(0), u.stride(0), BP=tile, BQ=block,
            num_warps=4,
        )  # fmt: skip
    return y


@triton.jit
@no_type_check
def _gate(v, weight, bias, place, q, inside, here):
    """Compute channels q of one gate: the sigmoid of a block's product."""
    w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    return tl.sigmoid(tl.sum(v[:, None] * w, 0) + tl.load(bias + q, mask=here, other=0.0).to(tl.float32))


@triton.jit
@no_type_check
def _token(
    x, u, admit_weight, admit_bias, keep_weight, keep_bias, strength, state, y, scale, D, P, sxb, sub, BP: tl.constexpr,
    BQ: tl.constexpr,
):  # fmt: skip
    slices = tl.cdiv(P, BQ)
    h, b = tl.program_id(0) // slices, tl.program_id(1).to(tl.int64)
    p, q = tl.arange(0, BP), tl.program_id(0) % slices * BQ + tl.arange(0, BQ)
    here = q < P
    inside = (p < P)[:, None] & here[None, :]
    place = (h * P + p)[:, None] * P + q[None, :]
    v = tl.load(x + b * sxb + h * P + p, mask=p < P, other=0.0).to(tl.float32)
    i = _gate(v, admit_weight, admit_bias, place, h * P + q, inside, here)
    r = _gate(v, keep_weight, keep_bias, place, h * P + q, inside, here)
    own = tl.load(x + b * sxb + h * P + q, mask=here, other=0.0).to(tl.float32)
    lost = scale * _softplus(tl.load(strength + h * P + q, mask=here, other=0.0).to(tl.float32)) * r  # -log_a
    twice = 2.0 * lost
    small = twice * (1.0 - twice * (0.5 - twice * (0.16666667 - twice * 0.041666668)))  # series of 1 - exp(-twice)
    enters = tl.sqrt(tl.where(twice < 0.05, small, 1.0 - tl.exp(-twice))) * i * own
    held = state + b * D + h * P + q
    s = tl.exp(-lost) * tl.load(held, mask=here, other=0.0).to(tl.float32) + enters
    tl.debug_barrier()  # with fewer channels than threads, none may overwrite a value before another has read it
    tl.store(held, s.to(state.dtype.element_ty), mask=here)
    g = tl.load(u + b * sub + h * P + q, mask=here, other=0.0).to(tl.float32)
    g = g * tl.sigmoid(1.5957691216 * (g + 0.044715 * g * g * g))  # the tanh form of gelu
    tl.store(y + b * D + h * P + q, (s * g).to(y.dtype.element_ty), mask=here)
