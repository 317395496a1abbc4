"""Gated linear attention: a linear recurrence with one decay per key channel (GLA, arXiv 2312.06635).

    S_t = S_{t-1} diag(exp(log_a_t)) + v_t k_t^T        y_t = S_t q_t

This project has no kernel of its own; flash-linear-attention's runs if it passes a check (`kernels.fla`).
"""

from torch import Tensor

from students.kernels import Implementations, pick
from students.kernels.fla import Kernel
from students.kernels.fla import refusal as fla_refusal
from students.kernels.gla.inputs import check, draw
from students.kernels.gla.reference import gla as reference_gla
from students.kernels.gla.reference import gla_step as reference_step
from students.shapes import Float, Int

IMPLEMENTATIONS: Implementations = {"reference": reference_gla, "triton": Kernel("gla")}


def gla(
    q: Float[Tensor, "b t h n"],
    k: Float[Tensor, "b t h n"],
    v: Float[Tensor, "b t h p"],
    log_a: Float[Tensor, "b t h n"],
    documents: Int[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """Scan a whole sequence.

    The state is cleared wherever the document id changes; `initial_state` belongs to the document of the first token.
    Decays, states and sums are float32 or wider whatever the inputs are.

    Returns:
        y, in the type of v, and the state after the last token.
    """

    def refusal() -> str | None:
        return fla_refusal("gla", reference_gla, draw, check(v.shape[3], k.shape[3]), v)

    return pick("gla", IMPLEMENTATIONS, v, refusal)(q, k, v, log_a, documents, initial_state)


def gla_step(
    q: Float[Tensor, "b h n"],
    k: Float[Tensor, "b h n"],
    v: Float[Tensor, "b h p"],
    log_a: Float[Tensor, "b h n"],
    state: Float[Tensor, "b h p n"],
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p n"]]:
    """Compute one token of the recurrence: y and the new state."""
    return reference_step(q, k, v, log_a, state)
