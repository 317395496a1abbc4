"""One token of a Mamba-2 layer between its two projections, in place: convolution, decay, `ssd_step`, skip, gate and norm.

    x, B, C = act(conv(xBC))
    log_a = -softplus(decay)                                    discrete Mamba-2
    dt = softplus(decay + dt_bias), log_a = -dt exp(A_log)      stock Mamba-2, whose x enters times dt
    y = (S_t C + D x) silu(z), normalised by head, times its scales

Behind a window a token enters the state `lag` tokens late, and the output is decayed by what lies between: a running sum of
log_a, to which one number comes and from which one goes with every token. It is kept in float64, where that is exact enough
for any length.
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
    """The convolution's filters and bias, its activation, and the ring of its inputs: column i at place i % w."""

    weight: Float[Tensor, "c w"]
    bias: Float[Tensor, " c"] | None
    activation: str | None
    ring: Float[Tensor, "b w c"]


class Lag(NamedTuple):
    """What has not entered the state yet, column i at place i % (lag + 1); the sum of its log_a up to column i at i % 2."""

    x: Float[Tensor, "b lag+1 h p"]
    B: Float[Tensor, "b lag+1 g n"]
    log_a: Float[Tensor, "b lag+1 h"]
    elapsed: Float[Tensor, "b 2 h"]


class Gate(NamedTuple):
    """What follows the scan: silu(z), an RMSNorm a head with its weight and epsilon, numbers a head, and 2 sigmoid(share),
    one for as many heads in a row as there are more of them."""

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
    """One token: `x` are the convolution's inputs, x, then B and C group by group; the state and all rings are changed.

    Args:
        column: the token's. dtype: of the output. stock: dt_bias and A_log; without it the mixer is discrete. rope: cosines,
            sines [b 1 r] and kind, for C and B after the convolution.

    Raises:
        ValueError: channels that are not x, B and C of whole groups.
    """
    heads, values, states = state.shape[1:]
    groups, left = divmod(x.shape[1] - heads * values, 2 * states)
    if left or groups < 1 or heads % groups:
        raise ValueError(f"{x.shape[1]} channels are not x of {heads} heads of {values}, and B and C of {states} states")
    refusal = None
    if max(values, states) > WIDEST:
        refusal = f"a head of {values} values and {states} states is wider than {WIDEST}"
    if rope is not None:
        refusal = "its kernel does not rotate"
    run = pick("ssm_token", IMPLEMENTATIONS, conv.ring, refusal, checked=CHECKED["ssm_token"])
    return run(x, decay, conv, D, state, column, dtype, groups, stock, gate, lag, rope)
