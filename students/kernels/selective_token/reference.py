"""The one-token step of a Mamba layer in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from students.kernels.selective_scan.reference import selective_scan_step


def selective_token(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, state: Tensor, dtype: torch.dtype
) -> Tensor:
    """See `students.kernels.selective_token.selective_token`."""
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A_log, B, C, D, z = (part.to(state.dtype) for part in (x, dt, A_log, B, C, D, z))
        y, new = selective_scan_step(x, F.softplus(dt), -A_log.exp(), B, C, state)
        state.copy_(new)
        return ((y + D * x) * F.silu(z)).to(dtype)
