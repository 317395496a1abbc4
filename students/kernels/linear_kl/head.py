"""The language-model head as an argument of the LM head losses."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from students.shapes import Float


class Head(NamedTuple):
    """A language-model head: logits = softcap(scale (hidden weight^T + bias)).

    call: the head as a function of hidden states, for heads whose weight must not be read directly (adapters, offloading,
    quantisation). Then `weight` is None, and the logits of each chunk of tokens are computed twice for gradients.
    """

    weight: Float[Tensor, "v d"] | None
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    call: Callable[[Tensor], Tensor] | None = None

    def logits(self, hidden: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        """Compute the logits before scale and softcap."""
        if self.call is not None:
            return self.call(hidden)
        assert self.weight is not None, "a head needs a weight or a call"
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.linear(hidden, self.weight.to(hidden.dtype), bias)
