"""Initial values of several mixers: open gates, taps, decays, and the default SSM of composed mixers."""

import torch
from torch import Tensor

from students.mixers.projections import least_squares
from students.shapes import Float

OPEN_SILU = 1.278464542761  # solves silu(x) = x sigmoid(x) = 1: an open gate
OPEN_GELU = 1.144630309  # solves gelu(x) = 1 in its tanh form, x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 = 1
TAP = 0.25  # a convolution's identity tap before silu: close to 0, silu is almost a line
DT = 1.0  # the step of a state whose decays are in A
HALF_LIVES = (4.0, 512.0)  # the shortest and the longest initial half-life of heads, in tokens
SSM = {"mixer": "discrete_mamba2"}  # the default SSM of a mixer with an SSM and attention


def constant_row(h: Float[Tensor, "b t d"]) -> tuple[Float[Tensor, " d"], float]:
    """The least-squares row w of h w = 1 on these inputs, in place of a missing bias, and the mean square error."""
    tokens = h.flatten(0, 1)
    w, residual = least_squares(tokens, tokens.new_ones(len(tokens), 1))
    return w[:, 0].to(h.dtype), residual


def spread_half_lives(heads: int, shortest: float = HALF_LIVES[0], longest: float = HALF_LIVES[1]) -> Float[Tensor, " h"]:
    """Half-lives in tokens, spread evenly on a logarithmic scale over the heads."""
    return torch.logspace(torch.tensor(shortest).log2(), torch.tensor(longest).log2(), heads, base=2.0)
