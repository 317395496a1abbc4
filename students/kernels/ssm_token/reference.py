"""The one-token step of a Mamba-2 layer in plain PyTorch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from students.kernels.causal_conv.reference import conv_token
from students.kernels.heads import rotated
from students.kernels.ssd.reference import ssd_step

if TYPE_CHECKING:
    from students.kernels.ssm_token import Conv, Gate, Lag


def ssm_token(
    x: Tensor,
    decay: Tensor,
    conv: "Conv",
    D: Tensor,
    state: Tensor,
    column: Tensor,
    dtype: torch.dtype,
    groups: int,
    stock: tuple[Tensor, Tensor] | None,
    gate: "Gate | None",
    lag: "Lag | None",
    rope: tuple[Tensor, Tensor, str] | None,
) -> Tensor:
    """See `students.kernels.ssm_token.ssm_token`."""
    heads, values, states = state.shape[1:]
    with torch.autocast(x.device.type, enabled=False):
        wide = state.dtype
        mixed = conv_token(x.to(wide), conv.weight, conv.bias, conv.activation, conv.ring, column)
        v, B, C = mixed.split([heads * values, groups * states, groups * states], -1)
        v, B, C = v.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
        if rope is not None:
            B, C = (rotated(part, *rope) for part in (B, C))
        if stock is None:
            entering, log_a = v, -F.softplus(decay.to(wide))
        else:
            dt_bias, A_log = (part.to(wide) for part in stock)
            dt = F.softplus(decay.to(wide) + dt_bias)
            entering, log_a = v * dt[..., None], -dt * A_log.exp()
        if lag is None:
            y, new = ssd_step(entering, log_a, B, C, state)
        else:
            late, elapsed = _turned(lag, {"x": entering, "B": B, "log_a": log_a}, column)
            y, new = ssd_step(late["x"], late["log_a"], late["B"], C, state)
            y = y * elapsed.exp()[..., None].to(wide)
        state.copy_(new)
        y = y + D.to(wide)[:, None] * v
        if gate is not None:
            y = y * F.silu(gate.z.to(wide)).view_as(y)
            if gate.norm is not None:
                y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + gate.eps) * gate.norm.to(wide)
            y = y * (gate.scales[0] * gate.scales[1]).to(wide)[:, None]
            if gate.share is not None:
                share = 2 * gate.share.to(wide).sigmoid()
                y = y * share.repeat_interleave(heads // share.shape[1], 1)[..., None]
    return y.to(dtype)


def _turned(lag, new: dict[str, Tensor], column: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Replace the token that leaves the lag ring by the new one; returns it, and the sum of log_a of the tokens between."""
    size, late = lag.x.shape[1], {}
    for name, part in new.items():
        ring = getattr(lag, name)
        late[name] = ring.index_select(1, (column + 1) % size)[:, 0].to(part.dtype)
        ring.index_copy_(1, column % size, part[:, None].to(ring.dtype))
    before = lag.elapsed.index_select(1, (column + 1) % 2)[:, 0]
    elapsed = before + new["log_a"].to(before.dtype) - late["log_a"].to(before.dtype)
    lag.elapsed.index_copy_(1, column % 2, elapsed[:, None])
    return late, elapsed
