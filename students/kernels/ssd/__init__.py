"""State-space duality (SSD): a linear recurrence with one decay per head (Mamba-2, arXiv 2405.21060).

    S_t = exp(log_a_t) S_{t-1} + x_t B_t^T        y_t = S_t C_t

As a matrix: y = (tril(exp(segsum(log_a))) o C B^T) x. Stock Mamba-2 calls it with x scaled by dt and log_a = dt A, discrete
Mamba-2 with log_a = -softplus(a).
"""

import torch
from torch import Tensor

from students.kernels import TYPES, Deferred, Implementations, pick
from students.kernels.ssd.reference import accumulator
from students.kernels.ssd.reference import ssd as reference_ssd
from students.kernels.ssd.reference import ssd_step as reference_step
from students.shapes import Float, Int

IMPLEMENTATIONS: Implementations = {"reference": reference_ssd, "triton": Deferred("students.kernels.ssd.kernel", "ssd")}
STEPS: Implementations = {"reference": reference_step, "triton": Deferred("students.kernels.ssd.kernel", "ssd_step")}
CHECKED = {"ssd": TYPES, "ssd_step": (torch.bfloat16,)}  # types compared with float64 on a GPU
WIDEST = 256  # most values or states of a head in the Triton kernels


def ssd(
    x: Float[Tensor, "b t h p"],
    log_a: Float[Tensor, "b t h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    documents: Int[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """Scan a whole sequence.

    Head i reads group i // (h / g). The state is cleared wherever the document id changes; `initial_state` belongs to
    the document of the first token. Decays, states and sums are float32 or wider whatever the inputs are.

    Returns:
        y, in the type of x, and the state after the last token.

    Raises:
        ValueError: h is not a multiple of g.
    """
    _check_groups(x.shape[-2], B.shape[-2])
    run = pick("ssd", IMPLEMENTATIONS, x, _too_wide(x.shape[3], B.shape[3]), checked=CHECKED["ssd"])
    return run(x, log_a, B, C, documents, initial_state)


def ssd_step(
    x: Float[Tensor, "b h p"],
    log_a: Float[Tensor, "b h"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    state: Float[Tensor, "b h p n"],
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p n"]]:
    """Compute one token of the recurrence: y and the new state.

    The Triton kernel overwrites the state that is passed in, so that a captured CUDA graph can be replayed: do not use it
    afterwards. The kernel has no gradient; if one is needed, the reference runs, which leaves the old state unchanged.

    Raises:
        ValueError: h is not a multiple of g.
    """
    _check_groups(x.shape[-2], B.shape[-2])
    wants_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (x, log_a, B, C, state))
    refusal = "the one-token kernel has no gradient" if wants_gradient else _too_wide(x.shape[2], B.shape[2])
    return pick("ssd_step", STEPS, x, refusal, checked=CHECKED["ssd_step"])(x, log_a, B, C, state)


def zero_state(x: Float[Tensor, "b t h p"], B: Float[Tensor, "b t g n"]) -> Float[Tensor, "b h p n"]:
    """Returns the zero state before the first token, in the type of `ssd`'s states."""
    shape = (x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    return torch.zeros(shape, dtype=accumulator(x), device=x.device)


def _too_wide(values: int, states: int) -> str | None:
    wide = max(values, states) > WIDEST
    return f"a head of {values} values and {states} states is wider than {WIDEST}" if wide else None


def _check_groups(heads: int, groups: int) -> None:
    if heads % groups:
        raise ValueError(f"{heads} heads cannot share {groups} groups of B and C: {heads} % {groups} != 0")
