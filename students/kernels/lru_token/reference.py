"""One token of an RG-LRU layer in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def lru_token(x, u, admits, keeps, strength, c, state, dtype) -> Tensor:
    """See `students.kernels.lru_token.lru_token`."""
    with torch.autocast(x.device.type, enabled=False):
        wide = state.dtype
        x, u = x.to(wide), u.to(wide)
        heads = x.unflatten(-1, admits.bias.shape)
        i, r = (
            torch.sigmoid(torch.einsum("bhp,hpq->bhq", heads, gate.weight.to(wide)) + gate.bias.to(wide)).flatten(1)
            for gate in (admits, keeps)
        )
        log_a = -c * F.softplus(strength.to(wide)) * r
        state.copy_(log_a.exp() * state + (-torch.expm1(2 * log_a)).sqrt() * i * x)
        return (state * F.gelu(u, approximate="tanh")).to(dtype)
