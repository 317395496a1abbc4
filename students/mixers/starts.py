"""The values that several mixers start from: gates that are open, taps, decays, and the SSM beside attention."""

import torch
from torch import Tensor

from students.mixers.projections import least_squares
from students.shapes import Float

OPEN_SILU = 1.278464542761  # solves silu(x) = x sigmoid(x) = 1: a gate that lets everything through
OPEN_GELU = 1.144630309  # solves gelu(x) = 1 in its tanh form, x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 = 1
TAP = 0.25  # a convolution's identity tap where silu follows: so near 0 silu is close to a line
DT = 1.0  # the step of a state whose decays stand in A
HALF_LIVES = (4.0, 512.0)  # in tokens: the shortest and the longest that heads begin with
SSM = {"mixer": "discrete_mamba2"}  # of a mixer that holds an SSM beside attention, unless its options name another


def constant_row(h: Float[Tensor, "b t d"]) -> tuple[Float[Tensor, " d"], float]:
    """The row w that comes nearest to h w = 1 on these inputs, and the mean square error: a bias where there is none."""
    tokens = h.flatten(0, 1)
    w, residual = least_squares(tokens, tokens.new_ones(len(tokens), 1))
    return w[:, 0].to(h.dtype), residual


def spread_half_lives(heads: int, shortest: float = HALF_LIVES[0], longest: float = HALF_LIVES[1]) -> Float[Tensor, " h"]:
    """Half-lives in tokens, spread evenly on a logarithmic scale over the heads."""
    return torch.logspace(torch.tensor(shortest).log2(), torch.tensor(longest).log2(), heads, base=2.0)
