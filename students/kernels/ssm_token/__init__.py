"""One-token step of a Mamba-2 layer between its two projections: convolution, decay, `ssd_step`, skip, gate and norm.

    x, B, C = act(conv(xBC))
    log_a = -softplus(decay)                                    discrete Mamba-2
    dt = softplus(decay + dt_bias), log_a = -dt exp(A_log)      stock Mamba-2, whose x enters times dt
    y = (S_t C + D x) silu(z), normalised by head, times its scales

The step changes the state and the rings in place. With a window branch, a token enters the state `lag` tokens late, and the
output is decayed by the sum of log_a over the tokens in between. That running sum is kept in float64: with every token one
number is added and one subtracted, and float64 is exact enough for any length.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from students.kernels import TYPES, Deferred, Implementations, pick
from students.kernels.ssm_token.reference import ssm_token as reference_token
from students.shapes import Float, Int

IMPLEMENTATIONS: Implementations = {
    "reference": reference_token,
    "triton": Deferred("students.kernels.ssm_token.kernel", "ssm_token"),
}
CHECKED = {"ssm_token": TYPES}  # types compared with float64 on a GPU
WIDEST = 256  # values or states of a head


class Conv(NamedTuple):
    """The convolution's filters, bias and activation, and the ring of its inputs: column i is at place i % w."""

    weight: Float[Tensor, "c w"]
    bias: Float[Tensor, " c"] | None
    activation: str | None
    ring: Float[Tensor, "b w c"]


class Lag(NamedTuple):
    """The tokens that have not entered the state yet: column i is at place i % (lag + 1).

    elapsed: the sum of their log_a up to column i, at place i % 2.
    """

    x: Float[Tensor, "b lag+1 h p"]
    B: Float[Tensor, "b lag+1 g n"]
    log_a: Float[Tensor, "b lag+1 h"]
    elapsed: Float[Tensor, "b 2 h"]


class Gate(NamedTuple):
    """The factors of the scan's output: silu(z), an RMSNorm per head, two scales per head, and 2 sigmoid(share).

    Each share belongs to h / terms neighbouring heads.
    """

    z: Float[Tensor, "b hp"]
    norm: Float[Tensor, "h p"] | None
    eps: float
    scales: tuple[Float[Tensor, " h"], Float[Tensor, " h"]]
    share: Float[Tensor, "b terms"] | None = None


def ssm_token(
    x: Float[Tensor, "b c"],
    decay: Float[Tensor, "b h"],
    conv: Conv,
    D: Float[Tensor, " h"],
    state: Float[Tensor, "b h p n"],
    column: Int[Tensor, " 1"],
    dtype: torch.dtype,
    *,
    stock: tuple[Float[Tensor, " h"], Float[Tensor, " h"]] | None = None,
    gate: Gate | None = None,
    lag: Lag | None = None,
    rope: tuple[Tensor, Tensor, str] | None = None,
) -> Float[Tensor, "b h p"]:
    """Compute one token; the state and all rings are changed in place.

    Args:
        x: the convolution's inputs: x, then B, then C of all groups. column: number of the token in the rings. dtype: type
            of the output. stock: dt_bias and A_log of stock Mamba-2; None for discrete Mamba-2. rope: cosines, sines
            [b 1 r] and kind, for C and B after the convolution.

    Raises:
        ValueError: the channels do not divide into x, B and C of whole groups.
    """
    heads, values, states = state.shape[1:]
    groups, left = divmod(x.shape[1] - heads * values, 2 * states)
    if left or groups < 1 or heads % groups:
        raise ValueError(
            f"{x.shape[1]} channels do not divide into x ({heads} heads of {values} values) and B and C (groups of {states})"
        )
    refusal = None
    if max(values, states) > WIDEST:
        refusal = f"a head of {values} values and {states} states is wider than {WIDEST}"
    if rope is not None:
        refusal = "its kernel has no rotary embedding"
    run = pick("ssm_token", IMPLEMENTATIONS, conv.ring, refusal, checked=CHECKED["ssm_token"])
    return run(x, decay, conv, D, state, column, dtype, groups, stock, gate, lag, rope)
