"""One-token norms and rotary embedding of q and k in plain PyTorch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from students.kernels.heads import rotated

if TYPE_CHECKING:
    from students.kernels.rotary_token import Places


def rotary_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor],
    places: "Places",
    norms: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """See `students.kernels.rotary_token.rotary_token`."""
    kind = places.keys.dtype
    q, k, v = (part.to(kind) for part in (q, k, v))
    if norms is not None:
        q, k = (_normed(part, weight, norms[2]) for part, weight in ((q, norms[0]), (k, norms[1])))
    cos, sin = tables
    q, k = (rotated(part, cos, sin, "half") for part in (q, k))
    places.keys.index_copy_(2, places.place, k[:, :, None])
    places.values.index_copy_(2, places.place, v[:, :, None])
    return q[:, :, None]


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)).to(x.dtype)
