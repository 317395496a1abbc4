"""The one-token step of a Mamba-2 layer in Triton: one launch.

A program computes one head, or a slice of its values. B and C of a group and the decay of a head are needed by several
programs; each computes them itself. The rings have one place more than is read, so that no program overwrites a place that
another still reads.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels import launch
from students.kernels.ssd.kernel import _place
from students.kernels.ssm_token import Conv, Gate, Lag


class Config(NamedTuple):
    """Elements of the state in a program, and its warps."""

    elements: int
    warps: int


CONFIGS = [Config(512, 2), Config(2048, 2), Config(1024, 2), Config(1024, 4)]  # for few heads; for many; others to try
MANY = 4  # heads of all sequences per multiprocessor from which larger slices, with fewer repeated computations, are faster


def ssm_token(
    x: Tensor,
    decay: Tensor,
    conv: Conv,
    D: Tensor,
    state: Tensor,
    column: Tensor,
    dtype: torch.dtype,
    groups: int,
    stock: tuple[Tensor, Tensor] | None,
    gate: Gate | None,
    lag: Lag | None,
    rope: tuple[Tensor, Tensor, str] | None,
    config: Config | None = None,
) -> Tensor:
    """See `students.kernels.ssm_token.ssm_token`."""
    (batch, heads, values, states), channels = state.shape, x.shape[1]
    config = config or CONFIGS[int(batch * heads >= MANY * launch.multiprocessors(x))]
    x, decay, weight = launch.rows_of(x), launch.rows_of(decay), conv.weight.contiguous()
    wide = triton.next_power_of_2(states)
    slice_ = min(triton.next_power_of_2(values), max(1, config.elements // wide))
    if gate is not None and gate.norm is not None:
        slice_ = triton.next_power_of_2(values)  # the norm needs the whole head
    y = torch.empty((batch, heads, values), dtype=dtype, device=x.device)
    z = launch.rows_of(gate.z) if gate is not None else x
    norm = gate.norm.contiguous() if gate is not None and gate.norm is not None else D
    scales = gate.scales if gate is not None else (D, D)
    share = None if gate is None else gate.share
    queue = lag if lag is not None else (x, x, decay, decay)
    dt_bias, A_log = stock if stock is not None else (D, D)
    with launch.on(x):
        _token[(triton.cdiv(values, slice_) * batch * heads,)](  # the grid's other axes hold at most 65,535
            x, decay, weight, conv.bias if conv.bias is not None else weight, conv.ring, D, state, column, y,
            dt_bias, A_log, z, norm, *scales, D if share is None else launch.rows_of(share), *queue,
            x.stride(0), decay.stride(0), z.stride(0), 0 if share is None else share.stride(0),
            1 if share is None else heads // share.shape[1], heads, heads // groups, groups, channels, values, states,
            gate.eps if gate is not None else 0.0, LAGGED=lag is not None, LAG=1 if lag is None else lag.x.shape[1],
            W=weight.shape[1], BIAS=conv.bias is not None, SILU=conv.activation == "silu", STOCK=stock is not None,
            GATE=gate is not None, NORM=gate is not None and gate.norm is not None, SHARE=share is not None, BP=slice_,
            BN=wide, num_warps=launch.warps(slice_ * wide, config.warps),
        )  # fmt: skip
    return y


# Kernels. `no_type_check` excludes them from the tests' shape checker, which cannot read them.


@triton.jit
@no_type_check
def _softplus(v):
    """Compute log(1 + exp(v)); a series is used if exp(v) is so small that 1 + exp(v) would round it off."""
    e = tl.exp(-tl.abs(v))
    small = e * (1.0 - e * (0.5 - e * (0.33333334 - 0.25 * e)))
    return tl.maximum(v, 0.0) + tl.where(e < 0.03, small, tl.log(1.0 + e))


@triton.jit
@no_type_check
def _convolved(x, ring, weight, bias, at, c, here, C, W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr):
    """Compute the convolution's output at channels c and write their inputs to the ring."""
    now = tl.load(x + c, mask=here, other=0.0).to(tl.float32)
    out = now * tl.load(weight + c * W + (W - 1), mask=here, other=0.0).to(tl.float32)
    if BIAS:
        out += tl.load(bias + c, mask=here, other=0.0).to(tl.float32)
    for lag in tl.static_range(1, W):
        v = tl.load(ring + ((at + (W - lag)) % W) * C + c, mask=here, other=0.0).to(tl.float32)
        out += v * tl.load(weight + c * W + (W - 1 - lag), mask=here, other=0.0).to(tl.float32)
    tl.store(ring + (at % W) * C + c, now.to(ring.dtype.element_ty), mask=here)
    if SILU:
        out = out * tl.sigmoid(out)
    return out


@triton.jit
@no_type_check
def _token(
    x, decay, weight, bias, ring, D, state, column, y, dt_bias, A_log, z, norm, gain, scale, share, late_x, late_B, late_a,
    elapsed, sxb, sdb, szb, shb, terms, H, repeat, G, C, P, N, eps, LAGGED: tl.constexpr, LAG: tl.constexpr, W: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr, STOCK: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, SHARE: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row, slab = _place(P, BP)
    b, h = row // H, row % H
    g = h // repeat
    at = tl.load(column)
    p = slab * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    inside = (p < P)[:, None] & (n < N)[None, :]
    place = state + row * (P * N) + p[:, None] * N + n[None, :]
    s = tl.load(place, mask=inside, other=0.0).to(tl.float32)

    x += b * sxb
    ring += b * W * C
    v = _convolved(x, ring, weight, bias, at, h * P + p, p < P, C, W, BIAS, SILU)
    k = _convolved(x, ring, weight, bias, at, H * P + g * N + n, n < N, C, W, BIAS, SILU)
    q = _convolved(x, ring, weight, bias, at, H * P + (G + g) * N + n, n < N, C, W, BIAS, SILU)

    a = tl.load(decay + b * sdb + h).to(tl.float32)
    enters = v
    if STOCK:
        dt = _softplus(a + tl.load(dt_bias + h).to(tl.float32))
        a = -dt * tl.exp(tl.load(A_log + h).to(tl.float32))
        enters = v * dt
    else:
        a = -_softplus(a)

    if LAGGED:
        leaves = b * LAG + (at + 1) % LAG
        comes = b * LAG + at % LAG
        gone_x = tl.load(late_x + (leaves * H + h) * P + p, mask=p < P, other=0.0).to(tl.float32)
        gone_k = tl.load(late_B + (leaves * G + g) * N + n, mask=n < N, other=0.0).to(tl.float32)
        gone_a = tl.load(late_a + leaves * H + h)
        total = tl.load(elapsed + (b * 2 + (at + 1) % 2) * H + h) + a.to(tl.float64) - gone_a.to(tl.float64)
        tl.store(elapsed + (b * 2 + at % 2) * H + h, total)
        tl.store(late_x + (comes * H + h) * P + p, enters.to(late_x.dtype.element_ty), mask=p < P)
        tl.store(late_B + (comes * G + g) * N + n, k.to(late_B.dtype.element_ty), mask=n < N)
        tl.store(late_a + comes * H + h, a.to(late_a.dtype.element_ty))
        s = tl.exp(gone_a.to(tl.float32)) * s + gone_x[:, None] * gone_k[None, :]
        out = tl.sum(s * q[None, :], 1) * tl.exp(total.to(tl.float32))
    else:
        s = tl.exp(a) * s + enters[:, None] * k[None, :]
        out = tl.sum(s * q[None, :], 1)
    tl.store(place, s.to(state.dtype.element_ty), mask=inside)

    out += tl.load(D + h).to(tl.float32) * v
    if GATE:
        u = tl.load(z + b * szb + h * P + p, mask=p < P, other=0.0).to(tl.float32)
        out = out * u * tl.sigmoid(u)
        if NORM:
            out = out * tl.rsqrt(tl.sum(tl.where(p < P, out * out, 0.0), 0) / P + eps)
            out = out * tl.load(norm + h * P + p, mask=p < P, other=0.0).to(tl.float32)
        out = out * tl.load(gain + h).to(tl.float32) * tl.load(scale + h).to(tl.float32)
        if SHARE:
            out = out * (2.0 * tl.sigmoid(tl.load(share + b * shb + h // terms).to(tl.float32)))
    tl.store(y + row * P + p, out.to(y.dtype.element_ty), mask=p < P)
