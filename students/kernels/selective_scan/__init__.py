"""Mamba-1's selective scan: a state of n numbers a channel, each decaying by its own factor (arXiv 2312.00752).

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t

dt is positive already (after its softplus); the skip D x and the gate are the caller's.
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
WIDEST = 256  # states of a channel that the Triton kernels serve


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
    """One token of the recurrence: y and the new state, from the state before it.

    The Triton kernel writes the new state over the old one, so that a captured graph can go on from it: do not use the
    state that was passed in afterwards. It has no gradient; where one is wanted the reference runs, and leaves it alone.

    Raises:
        ValueError: d is not a multiple of g.
    """
    check_groups(x.shape[-1], B.shape[-2])
    wants_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (x, dt, A, B, C, state))
    refusal = "the one-token kernel has no gradient" if wants_gradient else too_wide(A.shape[1])
    run = pick("selective_scan_step", STEPS, x, refusal, checked=CHECKED["selective_scan_step"])
    return run(x, dt, A, B, C, state)


def too_wide(states: int) -> str | None:
    """Why the Triton kernels do not serve so many states a channel, if they do not."""
    return f"{states} states a channel are more than {WIDEST}" if states > WIDEST else None


def check_groups(channels: int, groups: int) -> None:
    """Refuse channels that cannot share the groups of B and C.

    Raises:
        ValueError: they cannot.
    """
    if channels % groups:
        raise ValueError(f"{channels} channels cannot share {groups} groups of B and C: {channels} % {groups} != 0")
