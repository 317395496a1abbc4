"""One-token step of an RG-LRU layer after its convolution: both gates, decay, the scan's step and the layer's gate.

i, r = sigmoid(x W_i + b_i), sigmoid(x W_r + b_r), one block of W per head   log_a = -c softplus(strength) r
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
WIDEST = 256  # most channels of a head


class BlockGate(NamedTuple):
    """A gate's weight, one block per head, and its bias."""

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
    """Compute one token that is not the first of its sequence; the state is changed in place.

    Args:
        x: output of the convolution. u: input of gelu. admits, keeps: the gates i and r. dtype: type of the output.
    """
    width = admits.weight.shape[1]
    refusal = f"a head of {width} channels is wider than {WIDEST}" if width > WIDEST else None
    run = pick("lru_token", IMPLEMENTATIONS, state, refusal, checked=CHECKED["lru_token"])
    return run(x, u, admits, keeps, strength, c, state, dtype)
