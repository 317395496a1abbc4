"""Small pieces that several mixers share: rotary embedding, key heads, low-rank logits, least squares."""

import math

import torch
from torch import Tensor, nn

from students.kernels.heads import rotated
from students.shapes import Float


def rotate(x: Float[Tensor, "b t h p"], rope: tuple[Tensor, Tensor], kind: str = "half") -> Float[Tensor, "b t h p"]:
    """Rotary embedding by the tables of each token, for all its heads; kind: see `Shape.rope`."""
    cos, sin = (table[:, :, None] for table in rope)
    return rotated(x, cos, sin, kind)


def fold_norm(
    projection: Float[Tensor, "h p d"],
    bias: Float[Tensor, "h p"] | None,
    weight: Float[Tensor, "h p"] | None,
    kind: str | None,
) -> tuple[Float[Tensor, "h p d"], Float[Tensor, "h p"] | None]:
    """Everything of a norm on q or k that is linear, put into their projection: its weight, and the mean it removes."""
    if weight is None:
        return projection, bias
    if kind == "layer":
        projection = projection - projection.mean(1, keepdim=True)
        bias = None if bias is None else bias - bias.mean(1, keepdim=True)
    return projection * weight[..., None], None if bias is None else bias * weight


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


def group_factors(
    q: Float[Tensor, "h p e"], k: Float[Tensor, "h p e"], groups: int, width: int, sharing: int
) -> tuple[Float[Tensor, "g n e"], Float[Tensor, "g n e"]]:
    """C and B of each group of heads: the `logit_factors` of its heads' mean logits, which are what one C and B for all of
    them can come nearest to.

    sharing: heads in a row that have the same k; they are added up first, so that the factors stay cheap.
    """
    heads = q.shape[0] // groups
    run = math.gcd(heads, sharing)
    q = q.unflatten(0, (groups, -1, run)).sum(2) / heads
    k = k.unflatten(0, (groups, -1, run))[:, :, 0]
    return logit_factors(q.flatten(1, 2), k.flatten(1, 2), width)


def lost_power(
    q: Float[Tensor, "h p e"], k: Float[Tensor, "h p e"], C: Float[Tensor, "g n e"], B: Float[Tensor, "g n e"]
) -> float:
    """The share of the logits' power, sum over heads of |q^T k|^2, that is not in their group's C^T B."""
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
    """The x that brings design x nearest to target, in float64, and the share of the target's power left unexplained.

    ridge: relative to the mean power of a column of design; equal columns share evenly.
    """
    design, target = design.double(), target.double()
    gram = design.T @ design
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram, design.T @ target)
    left = (design @ solution - target).square().sum() / target.square().sum().clamp_min(1e-300)
    return solution, left.item()


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x over the root mean square of its last dimension, in float32 or wider."""
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
    """x over the length of its last dimension, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def leading_directions(rows: Float[Tensor, "h p d"], count: int) -> Float[Tensor, "count d"]:
    """The first right singular vectors of some rows, what they read most of an input; zeros where they have no more."""
    directions = torch.linalg.svd(rows.flatten(0, 1).double(), full_matrices=False)[2][:count]
    return nn.functional.pad(directions, (0, 0, 0, count - len(directions))).to(rows.dtype)
