"""The gated delta rule: a linear recurrence that replaces the value stored under a key (gated DeltaNet, arXiv 2412.06464).

    S_t = exp(log_a_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        y_t = S_t q_t

With log_a = 0 it is the delta rule of arXiv 2406.06484. Keys should have unit length and beta be in [0, 1]; then no state
grows. This project has no kernel of its own; flash-linear-attention's runs if it passes a check (`kernels.fla`).
"""

from torch import Tensor

from students.kernels import Implementations, pick
from students.kernels.fla import Kernel
from students.kernels.fla import refusal as fla_refusal
from students.kernels.gated_delta_rule.inputs import check, draw
from students.kernels.gated_delta_rule.reference import gated_delta_rule as reference_rule
from students.kernels.gated_delta_rule.reference import gated_delta_rule_step as reference_step
from students.shapes import Float, Int

IMPLEMENTATIONS: Implementations = {"reference": reference_rule, "triton": Kernel("gated_delta_rule")}


def gated_delta_rule(
    q: Float[Tensor, "b t g n"],
    k: Float[Tensor, "b t g n"],
    v: Float[Tensor, "b t h p"],
    log_a: Float[Tensor, "b t h"],
    beta: Float[Tensor, "b t h"],
    documents: Int[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """Scan a whole sequence.

    Head i reads key head i // (h / g). The state is cleared wherever the document id changes; `initial_state` belongs to
    the document of the first token. Decays, states and sums are float32 or wider whatever the inputs are.

    Returns:
        y, in the type of v, and the state after the last token.

    Raises:
        ValueError: h is not a multiple of g.
    """
    _check_groups(v.shape[2], k.shape[2])

    def refusal() -> str | None:
        case = check(v.shape[3], k.shape[3])
        return fla_refusal("gated_delta_rule", reference_rule, draw, case, v)

    run = pick("gated_delta_rule", IMPLEMENTATIONS, v, refusal)
    return run(q, k, v, log_a, beta, documents, initial_state)


def gated_delta_rule_step(
    q: Float[Tensor, "b g n"],
    k: Float[Tensor, "b g n"],
    v: Float[Tensor, "b h p"],
    log_a: Float[Tensor, "b h"],
    beta: Float[Tensor, "b h"],
    state: Float[Tensor, "b h p n"],
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p n"]]:
    """Compute one token of the recurrence: y and the new state.

    Raises:
        ValueError: h is not a multiple of g.
    """
    _check_groups(v.shape[1], k.shape[1])
    return reference_step(q, k, v, log_a, beta, state)


def _check_groups(heads: int, groups: int) -> None:
    if heads % groups:
        raise ValueError(f"{heads} heads cannot share {groups} key heads: {heads} % {groups} != 0")
