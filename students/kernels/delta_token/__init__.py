"""One-token step of a gated DeltaNet layer between its two projections: convolution, decay, delta rule, norm and gate.

q, k, v = silu(conv(qkv)), q and k to unit length, q over sqrt(n)
beta = sigmoid(b)                                   a = exp(-exp(A_log) softplus(decay + dt_bias))
S_t = a S_{t-1} + beta (v - a S_{t-1} k) k^T        y = weight rms_norm(S_t q, each head) silu(z)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from students.kernels import TYPES, Deferred, Implementations, pick
from students.kernels.delta_token.reference import delta_token as reference_token
from students.kernels.ssm_token import Conv
from students.shapes import Float, Int

IMPLEMENTATIONS: Implementations = {
    "reference": reference_token,
    "triton": Deferred("students.kernels.delta_token.kernel", "delta_token"),
}
CHECKED = {"delta_token": TYPES}  # types compared with float64 on a GPU
WIDEST = 128  # most channels of a head


class Decay(NamedTuple):
    """The parameters of the heads' decays."""

    dt_bias: Float[Tensor, " h"]
    A_log: Float[Tensor, " h"]


def delta_token(
    x: Float[Tensor, "b c"],
    b: Float[Tensor, "b h"],
    decay: Float[Tensor, "b h"],
    z: Float[Tensor, "b hp"],
    conv: Conv,
    decays: Decay,
    norm: tuple[Float[Tensor, " p"], float],
    state: Float[Tensor, "b h p n"],
    column: Int[Tensor, " 1"],
    dtype: torch.dtype,
) -> Float[Tensor, "b h p"]:
    """Compute one token; the state and the convolution's ring are changed in place.

    Args:
        x: the convolution's inputs: q of all heads, then k, then v. norm: the norm's weight, shared by all heads, and its
            epsilon. column: number of the token in the ring. dtype: type of the output.

    Raises:
        ValueError: the channels are not q, k and v of these heads.
    """
    heads, values, keys = state.shape[1:]
    if x.shape[1] != heads * (values + 2 * keys):
        raise ValueError(
            f"{x.shape[1]} channels do not divide into q and k ({heads} heads of {keys}) and v ({heads} heads of {values})"
        )
    widest = max(values, keys)
    refusal = f"a head of {widest} channels is wider than {WIDEST}" if widest > WIDEST else None
    run = pick("delta_token", IMPLEMENTATIONS, conv.ring, refusal, checked=CHECKED["delta_token"])
    return run(x, b, decay, z, conv, decays, norm, state, column, dtype)
