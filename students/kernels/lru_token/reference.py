"""The one-token step of an RG-LRU layer in plain PyTorch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from students.kernels.linear_scan.reference import linear_scan_step
from students.shapes import Float

if TYPE_CHECKING:
    from students.kernels.lru_token import BlockGate


def lru_token(
    x: Tensor,
    u: Tensor,
    admits: "BlockGate",
    keeps: "BlockGate",
    strength: Tensor,
    c: float,
    state: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """See `students.kernels.lru_token.lru_token`."""
    with torch.autocast(x.device.type, enabled=False):
        wide = state.dtype
        x, u = x.to(wide), u.to(wide)
        heads = x.unflatten(-1, admits.bias.shape)
        i, r = (block_gate(heads, *gate).flatten(1) for gate in (admits, keeps))
        log_a = -c * F.softplus(strength.to(wide)) * r
        y, new = linear_scan_step((-torch.expm1(2 * log_a)).sqrt() * i * x, log_a, state)
        state.copy_(new)
        return (y * F.gelu(u, approximate="tanh")).to(dtype)


def block_gate(x: Float[Tensor, "... h p"], weight: Float[Tensor, "h p p"], bias: Float[Tensor, "h p"]) -> Tensor:
    """Compute sigmoid(x W + b), with one block of W per head, in float32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return torch.sigmoid(torch.einsum("...hp,hpq->...hq", x.to(wide), weight.to(wide)) + bias.to(wide))
