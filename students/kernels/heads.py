"""Norms and rotary embedding of q and k, head by head, as attention applies them before its logits."""

import torch
from torch import Tensor

from students.shapes import Float


def rotated(x: Float[Tensor, "... p"], cos: Float[Tensor, "... r"], sin: Float[Tensor, "... r"], kind: str) -> Tensor:
    """Apply rotary embedding (arXiv 2104.09864) to the first r channels; the tables broadcast against `x`.

    kind: see `Shape.rope`.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if kind == "pairs":
        across = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        across = torch.cat([-second, first], -1)
    turned = turned * cos + across * sin
    return torch.cat([turned, kept], -1) if kept.shape[-1] else turned


def qk_norm(x: Float[Tensor, "... h p"], weight: Float[Tensor, "h p"], kind: str, eps: float) -> Float[Tensor, "... h p"]:
    """Normalise q or k as attention does before the rotary embedding; kind: see `Shape.qk_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    power = wide.square().mean((-2, -1) if kind == "rms_wide" else -1, keepdim=True)
    return (wide * torch.rsqrt(power + eps) * weight.to(wide.dtype)).to(x.dtype)
