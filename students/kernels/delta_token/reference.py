"""The one-token step of a gated DeltaNet layer in plain PyTorch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from students.kernels.causal_conv.reference import conv_token
from students.kernels.gated_delta_rule.reference import gated_delta_rule_step

if TYPE_CHECKING:
    from students.kernels.delta_token import Decay
    from students.kernels.ssm_token import Conv

UNIT = 1e-6  # epsilon in the normalisation of q and k to unit length


def delta_token(
    x: Tensor,
    b: Tensor,
    decay: Tensor,
    z: Tensor,
    conv: "Conv",
    decays: "Decay",
    norm: tuple[Tensor, float],
    state: Tensor,
    column: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """See `students.kernels.delta_token.delta_token`."""
    heads, values, keys = state.shape[1:]
    with torch.autocast(x.device.type, enabled=False):
        wide = state.dtype
        mixed = conv_token(x.to(wide), conv.weight, conv.bias, conv.activation, conv.ring, column)
        parts = mixed.split([heads * keys, heads * keys, heads * values], -1)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in parts)
        q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + UNIT) for part in (q, k))
        log_a = -F.softplus(decay.to(wide) + decays.dt_bias.to(wide)) * decays.A_log.to(wide).exp()
        y, new = gated_delta_rule_step(q * keys**-0.5, k, v, log_a, torch.sigmoid(b.to(wide)), state)
        state.copy_(new)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm[1]) * norm[0].to(wide)
        y = y * F.silu(z.to(wide)).view_as(y)
    return y.to(dtype)
