"""A language-model head, as the divergences between two of them take it."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from students.shapes import Float


class Head(NamedTuple):
    """A language-model head: logits = softcap(scale (hidden weight^T + bias)).

    call: the head as a function of hidden states, where its weight must not be read (adapters, offloading, quantisation
    stand around it); there is no `weight` then, and the logits of a piece of tokens are computed twice for gradients.
    """

    weight: Float[Tensor, "v d"] | None
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    call: Callable[[Tensor], Tensor] | None = None

    def logits(self, hidden: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        """What scale and softcap are then applied to."""
        if self.call is not None:
            return self.call(hidden)
        assert self.weight is not None, "a head has a weight or is called"
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.linear(hidden, self.weight.to(hidden.dtype), bias)
