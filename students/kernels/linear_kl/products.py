"""What every divergence that takes its gradients chunk by chunk in the forward pass is made of."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GradientsKept(torch.autograd.Function):
    """A loss that ends the graph: `forward` leaves its gradients in `ctx.grads`, their types in `ctx.types`
    (of hidden states, weight and bias) and the op's name in `ctx.op`."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(f"{ctx.op}'s gradients were already handed out: it cannot run backward twice")
        grads, ctx.grads = ctx.grads, None
        return (*(None if g is None else g.mul_(d_loss).to(t) for g, t in zip(grads, ctx.types, strict=True)), None)


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left right, summed and stored in the type of `out`, which may be wider than that of the factors: on a GPU inside
    the product."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if out.is_cuda:
        return torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, in the type of `total` whatever the factors are: on a GPU inside the product."""
    if total.is_cuda and left.dtype != total.dtype:
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total += left @ right
