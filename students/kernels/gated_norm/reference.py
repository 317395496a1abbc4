"""Gated RMSNorm in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from students.shapes import Float


def gated_norm(
    y: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], weight: Float[Tensor, " c"], groups: int, eps: float
) -> Float[Tensor, "b t c"]:
    """See `students.kernels.gated_norm.gated_norm`."""
    gated = (y * F.silu(z)).unflatten(-1, (groups, -1))
    wide = gated.to(torch.promote_types(gated.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(y.dtype).flatten(-2) * weight.to(y.dtype)
