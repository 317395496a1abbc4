"""Helpers of several mixers: rotary embedding, norms, key heads, low-rank logits, least squares."""

import math

import torch
from torch import Tensor, nn

from students.kernels.heads import rotated
from students.shapes import Float


def rotate(x: Float[Tensor, "b t h p"], rope: tuple[Tensor, Tensor], kind: str = "half") -> Float[Tensor, "b t h p"]:
    """Rotary embedding of all heads by each token's cosines and sines; kind: see `Shape.rope`."""
    cos, sin = (table[:, :, None] for table in rope)
    return rotated(x, cos, sin, kind)


def fold_norm(
    projection: Float[Tensor, "h p d"],
    bias: Float[Tensor, "h p"] | None,
    weight: Float[Tensor, "h p"] | None,
    kind: str | None,
) -> tuple[Float[Tensor, "h p d"], Float[Tensor, "h p"] | None]:
    """A projection of q or k with the linear parts of its norm folded in: the norm's weight, and the removal of the mean."""
    if weight is None:
        return projection, bias
    if kind == "layer":
        projection = projection - projection.mean(1, keepdim=True)
        bias = None if bias is None else bias - bias.mean(1, keepdim=True)
    return projection * weight[..., None], None if bias is None else bias * weight


def per_head(tensor: Tensor, heads: int) -> Tensor:
    """One copy of a key head for every query head: head i gets key head i // (heads / key heads)."""
    return tensor.repeat_interleave(heads // tensor.shape[0], 0)


def logit_factors(
    q: Float[Tensor, "h p d"], k: Float[Tensor, "h p d"], width: int
) -> tuple[Float[Tensor, "h n d"], Float[Tensor, "h n d"]]:
    """Projections with `width` channels whose products equal those of q and k, or approximate them best.

    For `width` above p, rows of zeros are added, which is exact. Below p, these are the best rank-`width` factors of q^T k,
    with the singular values shared evenly.
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


def group_factors(
    q: Float[Tensor, "h p e"], k: Float[Tensor, "h p e"], groups: int, width: int, sharing: int
) -> tuple[Float[Tensor, "g n e"], Float[Tensor, "g n e"]]:
    """C and B of each group of heads: the `logit_factors` of the mean logits of its heads, the best fit by one C and B.

    sharing: the number of consecutive heads with the same k; their q are added up first, which makes the factors cheaper.
    """
    heads = q.shape[0] // groups
    run = math.gcd(heads, sharing)
    q = q.unflatten(0, (groups, -1, run)).sum(2) / heads
    k = k.unflatten(0, (groups, -1, run))[:, :, 0]
    return logit_factors(q.flatten(1, 2), k.flatten(1, 2), width)


def lost_power(
    q: Float[Tensor, "h p e"], k: Float[Tensor, "h p e"], C: Float[Tensor, "g n e"], B: Float[Tensor, "g n e"]
) -> float:
    """The share of the logits' power (the sum over heads of |q^T k|^2) that is not in their group's C^T B."""
    C, B = (per_head(part.double(), len(q)) for part in (C, B))
    q, k = q.double(), k.double()

    def product(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
        return ((left[0] @ right[0].transpose(1, 2)) * (left[1] @ right[1].transpose(1, 2))).sum()

    power = product((q, k), (q, k))
    left = power - 2 * product((q, k), (C, B)) + product((C, B), (C, B))
    return (left / power.clamp_min(1e-300)).item()


def least_squares(
    design: Float[Tensor, "s m"], target: Float[Tensor, "s k"], ridge: float = 1e-6
) -> tuple[Float[Tensor, "m k"], float]:
    """The least-squares solution x of design x = target, in float64, and the share of the target's power left unexplained.

    ridge: relative to the mean power of a column of `design`; with it, equal columns get equal weights.
    """
    design, target = design.double(), target.double()
    gram = design.T @ design
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram, design.T @ target)
    left = (design @ solution - target).square().sum() / target.square().sum().clamp_min(1e-300)
    return solution, left.item()


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x divided by the root mean square of its last dimension, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Norm(nn.Module):
    """RMSNorm of the last dimension, in float32 or wider."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        return rms_norm(x, self.eps) * self.weight.to(x.dtype)


def l2_norm(x: Float[Tensor, "b t h n"], eps: float = 1e-6) -> Float[Tensor, "b t h n"]:
    """x divided by the length of its last dimension, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def leading_directions(rows: Float[Tensor, "h p d"], count: int) -> Float[Tensor, "count d"]:
    """The first `count` right singular vectors of `rows`: input directions that they read most; zeros beyond their rank."""
    directions = torch.linalg.svd(rows.flatten(0, 1).double(), full_matrices=False)[2][:count]
    return nn.functional.pad(directions, (0, 0, 0, count - len(directions))).to(rows.dtype)
