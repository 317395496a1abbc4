"""How one token enters a layer and leaves it, where a `Decoder` holds the layer's state: in as few products as there can be.

Whatever a mixer projects of its input is asked for at once (`prime`), so that one kernel reads all of these weights where
they are, the norm before them included. Layers that something stands around are called, as everywhere (`students.wrapped`).
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
    """Rows of a linear layer that a mixer reads of its input. wide: not to be rounded below float32."""

    layer: nn.Module
    start: int | None = None
    stop: int | None = None
    wide: bool = False

    @property
    def rows(self) -> WeightRows:
        """These rows of a plain layer."""
        weight, bias = numbers(self.layer)
        bias = None if bias is None else bias[self.start : self.stop]
        return WeightRows(weight[self.start : self.stop], bias, self.wide)


class Entering:
    """The input of a layer's mixer, its norm perhaps still to come.

    Args:
        x: the input, or what its norm reads. norm: the norm's weight and epsilon, of an RMSNorm in float32 whose weight
            multiplies what was rounded to the type of x; None where x is the input.
    """

    def __init__(self, x: Float[Tensor, "b 1 d"], norm: tuple[Tensor, float] | None = None) -> None:
        self.x, self.norm = x, norm
        self._h: Tensor | None = x if norm is None else None
        self._primed: dict[Entry, Tensor] = {}

    @property
    def h(self) -> Float[Tensor, "b 1 d"]:
        """The input."""
        if self._h is None:
            assert self.norm is not None, "an input without a norm is there from the beginning"
            weight, eps = self.norm
            wide = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
            self._h = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(self.x.dtype)
        return self._h

    def prime(self, entries: Sequence[Entry]) -> None:
        """Compute these together, where nothing stands around their layers."""
        plain = [entry for entry in entries if is_plain(entry.layer)]
        if not plain or torch.is_autocast_enabled(self.x.device.type):
            return
        outputs = token_linear(self.x[:, 0], [entry.rows for entry in plain], norm=self.norm)
        self._primed |= {entry: output[:, None] for entry, output in zip(plain, outputs, strict=True)}

    def __call__(self, entry: Entry) -> Float[Tensor, "b 1 r"]:
        """What these rows give of the input: float32 or wider where it was primed or is to be wide."""
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
