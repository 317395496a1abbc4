"""Mamba-1's selective scan: each channel has a state of n numbers, each with its own decay (arXiv 2312.00752).

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t

dt is positive (after its softplus). The caller computes the skip D x and the gate.
"""

import torch
from torch import Tensor

from students.kernels import TYPES, Deferred, Implementations, pick
from students.kernels.selective_scan.reference import selective_scan as reference_scan
from students.kernels.selective_scan.reference import selective_scan_step as reference_step
from students.shapes import Float, Int

IMPLEMENTATIONS: Implementations = {
    "reference": reference_scan,
    "triton": Deferred("students.kernels.selective_scan.kernel", "selective_scan"),
}
STEPS: Implementations = {
    "reference": reference_step,
    "triton": Deferred("students.kernels.selective_scan.step", "selective_scan_step"),
}
CHECKED = {"selective_scan": TYPES, "selective_scan_step": (torch.bfloat16,)}  # types compared with float64 on a GPU
WIDEST = 256  # most states per channel in the Triton kernels


def selective_scan(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    documents: Int[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b d n"] | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """Scan a whole sequence.

    Channel i reads group i // (d / g). The state is cleared wherever the document id changes; `initial_state` belongs to
    the document of the first token. A is negative. Decays, states and sums are float32 or wider whatever the inputs are.

    Returns:
        y, in the type of x, and the state after the last token.

    Raises:
        ValueError: d is not a multiple of g.
    """
    check_groups(x.shape[-1], B.shape[-2])
    run = pick("selective_scan", IMPLEMENTATIONS, x, too_wide(A.shape[1]), checked=CHECKED["selective_scan"])
    return run(x, dt, A, B, C, documents, initial_state)


def selective_scan_step(
    x: Float[Tensor, "b d"],
    dt: Float[Tensor, "b d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    state: Float[Tensor, "b d n"],
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d n"]]:
    """Compute one token of the recurrence: y and the new state.

    The Triton kernel overwrites the state that is passed in, so that a captured CUDA graph can be replayed: do not use it
    afterwards. The kernel has no gradient; if one is needed, the reference runs, which leaves the old state unchanged.

    Raises:
        ValueError: d is not a multiple of g.
    """
    check_groups(x.shape[-1], B.shape[-2])
    wants_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (x, dt, A, B, C, state))
    refusal = "the one-token kernel has no gradient" if wants_gradient else too_wide(A.shape[1])
    run = pick("selective_scan_step", STEPS, x, refusal, checked=CHECKED["selective_scan_step"])
    return run(x, dt, A, B, C, state)


def too_wide(states: int) -> str | None:
    """Returns why the Triton kernels do not serve this number of states per channel; None if they do."""
    return f"{states} states per channel are more than {WIDEST}" if states > WIDEST else None


def check_groups(channels: int, groups: int) -> None:
    """Refuse channels that cannot be divided among the groups of B and C.

    Raises:
        ValueError: the number of channels is not a multiple of the number of groups.
    """
    if channels % groups:
        raise ValueError(f"{channels} channels cannot share {groups} groups of B and C: {channels} % {groups} != 0")
