"""The diagonal linear recurrence: every channel has its own decay at every token (RG-LRU, arXiv 2402.19427; HGRN).

h_t = exp(log_a_t) h_{t-1} + x_t
"""

import torch
from torch import Tensor

from students.kernels import TYPES, Deferred, Implementations, pick
from students.kernels.linear_scan.reference import linear_scan as reference_scan
from students.kernels.linear_scan.reference import linear_scan_step as reference_step
from students.shapes import Float, Int

IMPLEMENTATIONS: Implementations = {
    "reference": reference_scan,
    "triton": Deferred("students.kernels.linear_scan.kernel", "linear_scan"),
}
STEPS: Implementations = {
    "reference": reference_step,
    "triton": Deferred("students.kernels.linear_scan.kernel", "linear_scan_step"),
}
CHECKED = {"linear_scan": TYPES, "linear_scan_step": (torch.bfloat16,)}  # types compared with float64 on a GPU
WIDEST = 2**20  # most channels of the Triton kernel: within a tile of 1,024 tokens its offsets have 32 bits


def linear_scan(
    x: Float[Tensor, "b t d"],
    log_a: Float[Tensor, "b t d"],
    documents: Int[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b d"] | None = None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
    """Scan a whole sequence.

    The state is cleared wherever the document id changes; `initial_state` belongs to the document of the first token.
    Decays and states are float32 or wider whatever the inputs are.

    Returns:
        h, in the type of x, and the state after the last token, not rounded to that type.
    """
    refusal = f"{x.shape[2]} channels are more than {WIDEST}" if x.shape[2] > WIDEST else None
    run = pick("linear_scan", IMPLEMENTATIONS, x, refusal, checked=CHECKED["linear_scan"])
    return run(x, log_a, documents, initial_state)


def linear_scan_step(
    x: Float[Tensor, "b d"], log_a: Float[Tensor, "b d"], state: Float[Tensor, "b d"]
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
    """Compute one token of the recurrence: h, in the type of x, and the new state.

    The Triton kernel overwrites the state that is passed in, so that a captured CUDA graph can be replayed: do not use it
    afterwards. The kernel has no gradient; if one is needed, the reference runs, which leaves the old state unchanged.
    """
    wants_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (x, log_a, state))
    refusal = "the one-token kernel has no gradient" if wants_gradient else None
    return pick("linear_scan_step", STEPS, x, refusal, checked=CHECKED["linear_scan_step"])(x, log_a, state)
