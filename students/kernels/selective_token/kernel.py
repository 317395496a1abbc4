"""The one-token step of a Mamba layer in Triton: one launch, one program for a block of channels."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels import launch
from students.kernels.ssm_token.kernel import _softplus

ELEMENTS = 512  # elements of the state in one program


def selective_token(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, state: Tensor, dtype: torch.dtype
) -> Tensor:
    """See `students.kernels.selective_token.selective_token`."""
    (batch, channels, states), groups = state.shape, B.shape[1]
    x, dt, B, C, z = (launch.rows_of(part) for part in (x, dt, B, C, z))
    y = torch.empty((batch, channels), dtype=dtype, device=x.device)
    wide = triton.next_power_of_2(states)
    block = max(1, min(triton.next_power_of_2(channels), ELEMENTS // wide))
    with launch.on(x):
        _token[(triton.cdiv(channels, block), batch)](
            x, dt, A_log, B, C, D, z, state, y, channels, channels // groups, states, x.stride(0), dt.stride(0), z.stride(0),
            *B.stride()[:2], *C.stride()[:2], *A_log.stride(), BD=block, BN=wide, num_warps=launch.warps(block * wide, 2),
        )  # fmt: skip
    return y


@triton.jit
@no_type_check
def _token(
    x, dt, A_log, B, C, D, z, state, y, channels, share, N, sxb, sdb, szb, sBb, sBg, sCb, sCg, sAd, sAn, BD: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    here = c < channels
    both = here[:, None] & (n < N)[None, :]
    group = (c // share)[:, None]
    step = _softplus(tl.load(dt + b * sdb + c, mask=here, other=0.0).to(tl.float32))
    v = tl.load(x + b * sxb + c, mask=here, other=0.0).to(tl.float32)
    a = tl.exp(tl.load(A_log + c[:, None] * sAd + n[None, :] * sAn, mask=both, other=0.0).to(tl.float32))
    k = tl.load(B + b * sBb + group * sBg + n[None, :], mask=both, other=0.0).to(tl.float32)
    q = tl.load(C + b * sCb + group * sCg + n[None, :], mask=both, other=0.0).to(tl.float32)
    place = state + (b * channels + c[:, None]) * N + n[None, :]
    s = tl.load(place, mask=both, other=0.0).to(tl.float32)
    s = tl.exp(-step[:, None] * a) * s + (step * v)[:, None] * k
    tl.store(place, s.to(state.dtype.element_ty), mask=both)
    out = tl.sum(tl.where(both, s * q, 0.0), 1) + tl.load(D + c, mask=here, other=0.0).to(tl.float32) * v
    u = tl.load(z + b * szb + c, mask=here, other=0.0).to(tl.float32)
    tl.store(y + b * channels + c, (out * u * tl.sigmoid(u)).to(y.dtype.element_ty), mask=here)
