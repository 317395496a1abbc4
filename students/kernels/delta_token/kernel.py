"""The one-token step of a gated DeltaNet layer in Triton: one launch, one program per head."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels import launch
from students.kernels.delta_token import Decay
from students.kernels.delta_token.reference import UNIT
from students.kernels.ssm_token import Conv
from students.kernels.ssm_token.kernel import _convolved, _softplus

CONFIGS = [4, 8, 2]  # warps, the default first


def delta_token(
    x: Tensor,
    b: Tensor,
    decay: Tensor,
    z: Tensor,
    conv: Conv,
    decays: Decay,
    norm: tuple[Tensor, float],
    state: Tensor,
    column: Tensor,
    dtype: torch.dtype,
    config: int | None = None,
) -> Tensor:
    """See `students.kernels.delta_token.delta_token`."""
    (batch, heads, values, keys), channels = state.shape, x.shape[1]
    x, b, decay, z = (launch.rows_of(part) for part in (x, b, decay, z))
    weight, tile = conv.weight.contiguous(), (triton.next_power_of_2(values), triton.next_power_of_2(keys))
    y = torch.empty((batch, heads, values), dtype=dtype, device=x.device)
    with launch.on(x):
        _token[(heads, batch)](
            x, b, decay, z, weight, conv.bias if conv.bias is not None else weight, conv.ring, *decays, norm[0], state,
            column, y, x.stride(0), b.stride(0), decay.stride(0), z.stride(0),
            heads, channels, values, keys, norm[1], keys**-0.5, UNIT,
            W=weight.shape[1], BIAS=conv.bias is not None, SILU=conv.activation == "silu",
            BP=tile[0], BN=tile[1], num_warps=launch.warps(tile[0] * tile[1], config or CONFIGS[0]),
        )  # fmt: skip
    return y


# Kernels. `no_type_check` excludes them from the tests' shape checker, which cannot read them.


@triton.jit
@no_type_check
def _token(
    x, beta, decay, z, weight, bias, ring, dt_bias, A_log, norm, state, column, y, sxb, sbb, sdb, szb, H, C, P, N, eps,
    scale, unit, W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    at = tl.load(column).to(tl.int32)
    p = tl.arange(0, BP)
    n = tl.arange(0, BN)
    inside = (p < P)[:, None] & (n < N)[None, :]
    place = state + (b * H + h) * (P * N) + p[:, None] * N + n[None, :]
    s = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    x += b * sxb
    ring += b * W * C
    q = _convolved(x, ring, weight, bias, at, h * N + n, n < N, C, W, BIAS, SILU)
    k = _convolved(x, ring, weight, bias, at, (H + h) * N + n, n < N, C, W, BIAS, SILU)
    v = _convolved(x, ring, weight, bias, at, 2 * H * N + h * P + p, p < P, C, W, BIAS, SILU)
    q = tl.where(n < N, q, 0.0)
    k = tl.where(n < N, k, 0.0)
    q = q * tl.rsqrt(tl.sum(q * q, 0) + unit) * scale
    k = k * tl.rsqrt(tl.sum(k * k, 0) + unit)
    dt = _softplus(tl.load(decay + b * sdb + h).to(tl.float32) + tl.load(dt_bias + h).to(tl.float32))
    a = tl.exp(-dt * tl.exp(tl.load(A_log + h).to(tl.float32)))
    admits = tl.sigmoid(tl.load(beta + b * sbb + h).to(tl.float32))
    s = a * s
    written = admits * (v - tl.sum(s * k[None, :], 1))
    s += written[:, None] * k[None, :]
    tl.store(place, s.to(state.dtype.element_ty), mask=inside)
    out = tl.where(p < P, tl.sum(s * q[None, :], 1), 0.0)
    out = out * tl.rsqrt(tl.sum(out * out, 0) / P + eps) * tl.load(norm + p, mask=p < P, other=0.0).to(tl.float32)
    u = tl.load(z + b * szb + h * P + p, mask=p < P, other=0.0).to(tl.float32)
    tl.store(y + (b * H + h) * P + p, (out * u * tl.sigmoid(u)).to(y.dtype.element_ty), mask=p < P)
