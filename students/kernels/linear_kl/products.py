"""Shared parts of the LM head losses that compute gradients chunk by chunk in the forward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GradientsKept(torch.autograd.Function):
    """The base of losses that are the last operation of the graph and compute their gradients in `forward`.

    `forward` stores the gradients of hidden states, weight and bias in `ctx.grads`, their types in `ctx.types` and the op's
    name in `ctx.op`.
    """

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(f"{ctx.op}'s gradients were already used: its backward pass cannot run twice")
        grads, ctx.grads = ctx.grads, None
        return (*(None if g is None else g.mul_(d_loss).to(t) for g, t in zip(grads, ctx.types, strict=True)), None)


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Compute out = left right in the type of `out`, which may be wider than the factors'; a GPU converts in the product."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if out.is_cuda:
        return torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute total += left right in the type of `total`, which may be wider than the factors', as in `product`."""
    if total.is_cuda and left.dtype != total.dtype:
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total += left @ right
