"""Fused projections of one token into and out of a layer, for decoding with a `Decoder`, which holds the layer's state.

`prime` computes all input projections of a mixer, and the norm before them, in one kernel that reads the weights in place.
Layers that are not plain (`students.wrapped`) are called.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from students.kernels.token_linear import Rows as WeightRows
from students.kernels.token_linear import token_linear
from students.shapes import Float
from students.wrapped import Rows, is_plain, numbers, wide_linear


class Entry(NamedTuple):
    """Rows of a linear layer: a projection of a mixer's input. wide: the result is not rounded below float32."""

    layer: nn.Module
    start: int | None = None
    stop: int | None = None
    wide: bool = False

    @property
    def rows(self) -> WeightRows:
        """The weights and biases of these rows, of a plain layer."""
        weight, bias = numbers(self.layer)
        bias = None if bias is None else bias[self.start : self.stop]
        return WeightRows(weight[self.start : self.stop], bias, self.wide)


class Entering:
    """The input of a layer's mixer, before or after its norm.

    Args:
        x: the input, or the norm's input if `norm` is given. norm: weight and epsilon of an RMSNorm that is computed in
            float32 and rounded to the type of x before the weight multiplies it; None where x is the mixer's input.
    """

    def __init__(self, x: Float[Tensor, "b 1 d"], norm: tuple[Tensor, float] | None = None) -> None:
        self.x, self.norm = x, norm
        self._h: Tensor | None = x if norm is None else None
        self._primed: dict[Entry, Tensor] = {}

    @property
    def h(self) -> Float[Tensor, "b 1 d"]:
        """The mixer's input, after the norm."""
        if self._h is None:
            assert self.norm is not None, "without a norm, x is the input"
            weight, eps = self.norm
            wide = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
            self._h = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(self.x.dtype)
        return self._h

    def prime(self, entries: Sequence[Entry]) -> None:
        """Compute these projections in one kernel, where their layers are plain."""
        plain = [entry for entry in entries if is_plain(entry.layer)]
        if not plain or torch.is_autocast_enabled(self.x.device.type):
            return
        outputs = token_linear(self.x[:, 0], [entry.rows for entry in plain], norm=self.norm)
        self._primed |= {entry: output[:, None] for entry, output in zip(plain, outputs, strict=True)}

    def __call__(self, entry: Entry) -> Float[Tensor, "b 1 r"]:
        """The projection of the input by these rows, in float32 or wider if it was primed or `entry` is wide."""
        if entry not in self._primed:
            if not entry.wide:
                self._primed[entry] = Rows(entry.layer, self.h)(entry.start, entry.stop)
            elif entry.start is entry.stop is None:
                self._primed[entry] = wide_linear(self.h, entry.layer)
            else:
                self._primed[entry] = Rows(entry.layer, self.h).wide(entry.start, entry.stop)
        return self._primed[entry]


def leaving(layer: nn.Module, x: Float[Tensor, "b 1 r"], residual: Float[Tensor, "b 1 d"] | None) -> Float[Tensor, "b 1 d"]:
    """A linear layer's output for one token, added to `residual`."""
    if not is_plain(layer) or torch.is_autocast_enabled(x.device.type):
        out = layer(x)
        return out if residual is None else residual + out
    rows = [WeightRows(*numbers(layer), False)]
    before = None if residual is None else residual[:, 0]
    (out,) = token_linear(x[:, 0], rows, residual=before, dtype=x.dtype)
    return out[:, None]
