"""One token of an RG-LRU layer behind its convolution, in place: both gates, decay, the scan's step, and the layer's gate.

i, r = sigmoid(x W_i + b_i), sigmoid(x W_r + b_r), a block of W a head       log_a = -c softplus(strength) r
h_t = exp(log_a) h_{t-1} + sqrt(1 - exp(2 log_a)) i x                        y = h_t gelu(u)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from students.kernels import TYPES, Deferred, Implementations, pick
from students.kernels.lru_token.reference import block_gate
from students.kernels.lru_token.reference import lru_token as reference_token
from students.shapes import Float

__all__ = ["CHECKED", "BlockGate", "block_gate", "lru_token"]

IMPLEMENTATIONS: Implementations = {
    "reference": reference_token,
    "triton": Deferred("students.kernels.lru_token.kernel", "lru_token"),
}
CHECKED = {"lru_token": TYPES}  # types compared with float64 on a GPU
WIDEST = 256  # channels of a head


class BlockGate(NamedTuple):
    """A gate's weight, a block a head, and its bias."""

    weight: Float[Tensor, "h p p"]
    bias: Float[Tensor, "h p"]


def lru_token(
    x: Float[Tensor, "b hp"],
    u: Float[Tensor, "b hp"],
    admits: BlockGate,
    keeps: BlockGate,
    strength: Float[Tensor, " hp"],
    c: float,
    state: Float[Tensor, "b hp"],
    dtype: torch.dtype,
) -> Float[Tensor, "b hp"]:
    """One token that is not the first of its text; the state is changed.

    Args:
        x: what the convolution gives. u: what gelu reads. admits, keeps: the gates i and r. dtype: of the output.
    """
    width = admits.weight.shape[1]
    refusal = f"a head of {width} channels is wider than {WIDEST}" if width > WIDEST else None
    run = pick("lru_token", IMPLEMENTATIONS, state, refusal, checked=CHECKED["lru_token"])
    return run(x, u, admits, keeps, strength, c, state, dtype)
