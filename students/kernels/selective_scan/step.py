"""The one-token step of the selective scan in Triton; the state is updated in place."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from students.kernels import launch

LOG2E = tl.constexpr(1.4426950408889634)
STEP_ELEMENTS = 2048  # elements of the state in one program


def selective_scan_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """See `students.kernels.selective_scan.selective_scan_step`. `state` is updated in place and returned."""
    (batch, channels), (groups, states) = x.shape, B.shape[1:]
    B, C = launch.rows_of(B), launch.rows_of(C)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    wide = triton.next_power_of_2(states)
    block = max(1, min(triton.next_power_of_2(channels), STEP_ELEMENTS // wide))
    with launch.on(x):
        _step[(triton.cdiv(channels, block), batch)](
            x, dt, A, B, C, state, y, channels, channels // groups, states, *x.stride(), *dt.stride(), *A.stride(),
            *B.stride()[:2], *C.stride()[:2], *state.stride(), BD=block, BN=wide, num_warps=launch.warps(block * wide, 4),
        )  # fmt: skip
    return y, state


@triton.jit
@no_type_check
def _step(
    x, dt, A, B, C, state, y, D, W, N, sxb, sxd, sdb, sdd, sAd, sAn, sBb, sBg, sCb, sCg, ssb, ssd, ssn,
    BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    here = c < D
    both = here[:, None] & (n < N)[None, :]
    group = (c // W)[:, None]
    d = tl.load(dt + b * sdb + c * sdd, mask=here, other=0.0).to(tl.float32)
    v = tl.load(x + b * sxb + c * sxd, mask=here, other=0.0).to(tl.float32)
    A2 = tl.load(A + c[:, None] * sAd + n[None, :] * sAn, mask=both, other=0.0).to(tl.float32) * LOG2E
    k = tl.load(B + b * sBb + group * sBg + n[None, :], mask=both, other=0.0).to(tl.float32)
    q = tl.load(C + b * sCb + group * sCg + n[None, :], mask=both, other=0.0).to(tl.float32)
    place = state + b * ssb + c[:, None] * ssd + n[None, :] * ssn
    s = tl.load(place, mask=both, other=0.0).to(tl.float32)
    s = tl.exp2(d[:, None] * A2) * s + (d * v)[:, None] * k
    tl.store(place, s.to(state.dtype.element_ty), mask=both)
    tl.store(y + b * D + c, tl.sum(s * q, 1).to(y.dtype.element_ty), mask=here)
