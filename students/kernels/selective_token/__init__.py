"""One-token step of a Mamba layer after its convolution and projections: dt, decay, the scan's step, skip and gate.

dt = softplus(dt)        S_t = exp(-dt exp(A_log)) S_{t-1} + dt x B^T        y = (S_t C + D x) silu(z)
"""

import torch
from torch import Tensor

from students.kernels import TYPES, Deferred, Implementations, pick
from students.kernels.selective_scan import check_groups, too_wide
from students.kernels.selective_token.reference import selective_token as reference_token
from students.shapes import Float

IMPLEMENTATIONS: Implementations = {
    "reference": reference_token,
    "triton": Deferred("students.kernels.selective_token.kernel", "selective_token"),
}
CHECKED = {"selective_token": TYPES}  # types compared with float64 on a GPU


def selective_token(
    x: Float[Tensor, "b d"],
    dt: Float[Tensor, "b d"],
    A_log: Float[Tensor, "d n"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    D: Float[Tensor, " d"],
    z: Float[Tensor, "b d"],
    state: Float[Tensor, "b d n"],
    dtype: torch.dtype,
) -> Float[Tensor, "b d"]:
    """Compute one token; the state is changed in place.

    Args:
        x: output of the convolution. dt: input of softplus. B, C: channel i reads group i // (d / g). dtype: type of the
            output.

    Raises:
        ValueError: the channels cannot be divided among the groups.
    """
    channels, states = A_log.shape
    check_groups(channels, B.shape[1])
    run = pick("selective_token", IMPLEMENTATIONS, state, too_wide(states), checked=CHECKED["selective_token"])
    return run(x, dt, A_log, B, C, D, z, state, dtype)
