"""Fused linear layers for decoding, in plain PyTorch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from students.kernels.token_linear import Rows


def token_linear(
    x: Tensor,
    rows: "Sequence[Rows]",
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    swiglu: bool,
    dtype: torch.dtype | None,
    also: "tuple[Tensor, Rows] | None",
) -> list[Tensor]:
    """See `students.kernels.token_linear.token_linear`."""
    if norm is not None:
        weight, eps = norm
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        x = (weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)).to(x.dtype)
    outputs = [_product(x, *part) for part in rows]
    if swiglu:
        outputs = [F.silu(outputs[0]) * outputs[1]]
    for added in ([] if also is None else [_product(also[0], *also[1])]) + ([] if residual is None else [residual]):
        outputs = [added + outputs[0]]
    return outputs if dtype is None else [output.to(dtype) for output in outputs]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, wide: bool) -> Tensor:
    kind = torch.promote_types(weight.dtype, torch.float32) if wide else weight.dtype
    return F.linear(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind))
