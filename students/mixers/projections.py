"""Small pieces that several mixers share: rotary embedding, key-head expansion, low-rank logits, careful linears."""

import torch
from torch import Tensor, nn

from students.shapes import Float


def rotate(x: Float[Tensor, "b t h p"], rope: tuple[Tensor, Tensor]) -> Float[Tensor, "b t h p"]:
    """Rotary embedding (arXiv 2104.09864) in the half-split form; as many channels as the tables are wide."""
    cos, sin = (table[:, :, None].to(x.dtype) for table in rope)
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, kept], -1) if kept.shape[-1] else turned


def per_head(tensor: Tensor, heads: int) -> Tensor:
    """Give every query head its own copy of its key head: head i gets i // (heads / key heads)."""
    return tensor.repeat_interleave(heads // tensor.shape[0], 0)


def logit_factors(
    q: Float[Tensor, "h p d"], k: Float[Tensor, "h p d"], width: int
) -> tuple[Float[Tensor, "h n d"], Float[Tensor, "h n d"]]:
    """Projections of `width` channels whose products equal q and k's, or come nearest to them.

    Wider than p: zero rows, exact. Narrower: the best rank-`width` factors of q^T k, singular values shared evenly.
    """
    p = q.shape[1]
    if width >= p:
        pad = (0, 0, 0, width - p)
        return nn.functional.pad(q, pad), nn.functional.pad(k, pad)
    left, r_left = torch.linalg.qr(q.double().transpose(1, 2))  # [h d p]
    right, r_right = torch.linalg.qr(k.double().transpose(1, 2))
    u, s, vh = torch.linalg.svd(r_left @ r_right.transpose(1, 2))
    root = s[:, None, :width].sqrt()
    C = (left @ u[:, :, :width]) * root
    B = (right @ vh.transpose(1, 2)[:, :, :width]) * root
    return C.transpose(1, 2).to(q.dtype), B.transpose(1, 2).to(k.dtype)


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map in float32 or wider, also under autocast: decays do not survive bfloat16 well."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return nn.functional.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x over the root mean square of its last dimension, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
