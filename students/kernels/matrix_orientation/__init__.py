"""How far a mixer's matrix is from the attention matrix it should become, without either in memory.

MOHAWK (arXiv 2408.10189, section 4.1) minimises the Frobenius norm of A - M. Here, per batch row and head,

    A = softmax(scale Q K^T)            M = tril(exp(segsum(log_a))) o C B^T + diag(D)

both within documents, and the op returns sum (A - M)^2, so that memory grows with t and not with t^2.
"""

import torch
from torch import Tensor

from students.kernels import Deferred, Implementations, compute_type, pick
from students.kernels.matrix_orientation.reference import orientation_error as reference_error
from students.shapes import Float, Int

IMPLEMENTATIONS: Implementations = {
    "reference": reference_error,
    "triton": Deferred("students.kernels.matrix_orientation.kernel", "orientation_error"),
}
CHECKED = {"matrix_orientation": (torch.bfloat16,)}  # types compared with float64 on a GPU
WIDEST = 128  # heads or states that the Triton kernels serve: wider tiles have not been checked on a GPU


def orientation_error(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t kv d"],
    C: Float[Tensor, "b t h n"],
    B: Float[Tensor, "b t h n"],
    log_a: Float[Tensor, "b t h"],
    D: Float[Tensor, " h"] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    documents: Int[Tensor, "b t"] | None = None,
    min_lag: int = 0,
) -> tuple[Float[Tensor, "b h"], Float[Tensor, "b h"]]:
    """Compare the two matrices tile by tile.

    Args:
        q, k: the teacher's, after its norms and rotary embedding; query head i reads key head i // (h / kv).
        C, B, log_a, D: the mixer's matrix, with everything that multiplies it folded in.
        scale: what the teacher multiplies its logits by. softcap: its soft cap on them. window: its sliding window.
        min_lag: entries nearer to the diagonal than this count in neither result (another branch covers them).

    Returns:
        sum (A - M)^2 and sum A^2. Gradients flow to C, B, log_a and D, not to q and k.

    Raises:
        ValueError: h is not a multiple of kv.
    """
    heads, keys = q.shape[2], k.shape[2]
    if heads % keys:
        raise ValueError(f"{heads} query heads cannot share {keys} key heads: {heads} % {keys} != 0")
    wide = max(q.shape[3], C.shape[3])
    refusal = f"heads or states {wide} wide are wider than {WIDEST}" if wide > WIDEST else None
    run = pick("matrix_orientation", IMPLEMENTATIONS, C, refusal, compute_type(C), CHECKED["matrix_orientation"])
    return run(q, k, C, B, log_a, D, scale, softcap, window, documents, min_lag)
