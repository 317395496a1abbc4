"""Gated RMSNorm in Triton: one pass over the tensors forward, one backward.

A program processes one group of channels for a span of tokens, one tile of tokens at a time. The backward pass recomputes
gate and norm from y and z and sums the weight's gradient over its span; the forward pass saves only its inputs.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from students.kernels import launch


class Config(NamedTuple):
    """Elements of a tile, tiles of a program in the forward and backward pass, and warps."""

    elements: int
    tiles: int
    back_tiles: int
    warps: int


CONFIGS = [Config(2048, 2, 16, 4), Config(4096, 1, 8, 4), Config(1024, 4, 32, 2)]  # the default first


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, config: Config | None = None) -> Tensor:
    """See `students.kernels.gated_norm.gated_norm`."""
    z = z.to(y.dtype) if torch.is_grad_enabled() else z  # so that the gradient of z has z's type
    return _GatedNorm.apply(y, z, weight, groups, eps, config or CONFIGS[0])


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, weight, groups, eps, config):
        y, z, weight = y.contiguous(), z.contiguous(), weight.contiguous()
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        plan = _Plan(y, groups, eps, config)
        with launch.on(y):
            _forward[(groups, plan.spans(config.tiles))](y, z, weight, out, *plan.sizes, TILES=config.tiles, **plan.flags)
        ctx.save_for_backward(y, z, weight)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        (y, z, weight), plan = ctx.saved_tensors, ctx.plan
        d_out = d_out.to(y.dtype).contiguous()
        dy, dz = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for _ in range(2))
        tiles = plan.config.back_tiles
        spans = plan.spans(tiles)
        parts = torch.empty((spans, y.shape[-1]), dtype=torch.float32, device=y.device)
        with launch.on(y):
            _backward[(plan.groups, spans)](
                y, z, weight, d_out, dy, dz, parts, *plan.sizes, TILES=tiles, **plan.flags
            )  # fmt: skip
        return dy, dz, parts.sum(0).to(weight.dtype), None, None, None


class _Plan:
    """One call's sizes and tiles."""

    def __init__(self, y: Tensor, groups: int, eps: float, config: Config) -> None:
        self.groups, self.config = groups, config
        channels = y.shape[-1]
        self.rows = y.numel() // channels
        self.width = channels // groups
        block = triton.next_power_of_2(self.width)
        self.tile = max(1, config.elements // block)
        self.sizes = (self.rows, channels, eps)
        warps = max(config.warps, min(16, block // 1024))
        self.flags = {"WIDTH": self.width, "BLOCK": block, "ROWS": self.tile, "num_warps": warps}

    def spans(self, tiles: int) -> int:
        """Returns the number of programs that share a group's tokens."""
        return triton.cdiv(self.rows, self.tile * tiles)


# Kernels. `no_type_check` excludes them from the tests' shape checker, which cannot read them.


@triton.jit
@no_type_check
def _gated(y, z, place, inside, eps, WIDTH: tl.constexpr):
    """Returns y, sigmoid(z) and z in float32, the gated product, and 1 / its root mean square; zeros outside."""
    v = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(z + place, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(u)
    g = v * u * s
    return v, s, u, g, tl.rsqrt(tl.sum(g * g, 1) / WIDTH + eps)[:, None]


@triton.jit(do_not_specialize=["R"])
@no_type_check
def _forward(
    y, z, weight, out, R, C, eps, TILES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    column = tl.arange(0, BLOCK)
    here = column < WIDTH
    column += tl.program_id(0) * WIDTH
    w = tl.load(weight + column, mask=here, other=0.0).to(tl.float32)[None, :]
    start = tl.program_id(1) * (ROWS * TILES)
    for tile in range(TILES):
        row = start + tile * ROWS + tl.arange(0, ROWS)
        inside = (row < R)[:, None] & here[None, :]
        place = row.to(tl.int64)[:, None] * C + column[None, :]
        _v, _s, _u, g, r = _gated(y, z, place, inside, eps, WIDTH)
        tl.store(out + place, (g * r * w).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R"])
@no_type_check
def _backward(
    y, z, weight, d_out, dy, dz, parts, R, C, eps, TILES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    here = column < WIDTH
    column += tl.program_id(0) * WIDTH
    w = tl.load(weight + column, mask=here, other=0.0).to(tl.float32)[None, :]
    start = tl.program_id(1) * (ROWS * TILES)
    d_w = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in range(TILES):
        row = start + tile * ROWS + tl.arange(0, ROWS)
        inside = (row < R)[:, None] & here[None, :]
        place = row.to(tl.int64)[:, None] * C + column[None, :]
        v, s, u, g, r = _gated(y, z, place, inside, eps, WIDTH)
        d = tl.load(d_out + place, mask=inside, other=0.0).to(tl.float32)
        normed = g * r
        d_w += d * normed
        d = d * w
        d_g = r * (d - normed * (tl.sum(d * normed, 1) / WIDTH)[:, None])
        tl.store(dy + place, (d_g * u * s).to(dy.dtype.element_ty), mask=inside)
        tl.store(dz + place, (d_g * v * s * (1.0 + u * (1.0 - s))).to(dz.dtype.element_ty), mask=inside)
    tl.store(parts + tl.program_id(1).to(tl.int64) * C + column, tl.sum(d_w, 0), mask=here)
