"""Matrix orientation loss: the squared error between a mixer's matrix and the attention matrix, without either in memory.

MOHAWK (arXiv 2408.10189, section 4.1) minimises the Frobenius norm of A - M. Here, per sequence and head,

    A = softmax(scale Q K^T)            M = tril(exp(segsum(log_a))) o C B^T + diag(D)

Both are taken within documents. The op returns sum (A - M)^2, and its memory grows with t, not with t^2.
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
WIDEST = 128  # most channels or states of a head in the Triton kernels: wider tiles have not been checked on a GPU


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
        C, B, log_a, D: the factors of the mixer's matrix, with all its scales included.
        scale: factor of the teacher's logits. softcap: its soft cap on them. window: its sliding window.
        min_lag: entries nearer to the diagonal than this are left out of both results (the window branch covers them).

    Returns:
        sum (A - M)^2 and sum A^2. Gradients flow to C, B, log_a and D, not to q and k.

    Raises:
        ValueError: h is not a multiple of kv.
    """
    heads, keys = q.shape[2], k.shape[2]
    if heads % keys:
        raise ValueError(f"{heads} query heads cannot share {keys} key heads: {heads} % {keys} != 0")
    wide = max(q.shape[3], C.shape[3])
    refusal = f"heads or states of {wide} channels are wider than {WIDEST}" if wide > WIDEST else None
    run = pick("matrix_orientation", IMPLEMENTATIONS, C, refusal, compute_type(C), CHECKED["matrix_orientation"])
    return run(q, k, C, B, log_a, D, scale, softcap, window, documents, min_lag)
