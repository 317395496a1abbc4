"""LM head loss: a divergence between the teacher's and the student's distributions, without the whole batch's logits."""

import torch
from torch import Tensor

from students.kernels import Deferred, Implementations, compute_type, pick
from students.kernels.linear_kl.head import Head
from students.kernels.linear_kl.reference import DIVERGENCES, called_kl, check_vocabularies
from students.kernels.linear_kl.reference import linear_kl as reference_kl
from students.kernels.linear_kl.sparse import sparse_kl
from students.shapes import Float, Int

__all__ = ["DIVERGENCES", "Head", "linear_kl", "sparse_kl"]

IMPLEMENTATIONS: Implementations = {
    "reference": reference_kl,
    "triton": Deferred("students.kernels.linear_kl.kernel", "linear_kl"),
}
# Types compared with float64 on a GPU. Not float16: with a large vocabulary, most gradients of logits underflow in it.
CHECKED = {"linear_kl": (torch.bfloat16, torch.float32)}


def linear_kl(
    hidden: Float[Tensor, "t d"],
    head: Head,
    teacher_hidden: Float[Tensor, "t e"],
    teacher_head: Head,
    weights: Float[Tensor, " t"],
    targets: Int[Tensor, " t"] | None = None,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    ce_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Compute the weighted mean of a divergence and cross-entropy over tokens, in nats.

    The loss is sum_t weights_t ((1 - ce_weight) T^2 D(teacher_t, student_t) + ce_weight CE(targets_t)) / sum_t weights_t.
    D is "forward_kl" KL(teacher || student), "reverse_kl" KL(student || teacher) or "jsd", the mean of
    KL(teacher || mixture) and KL(student || mixture), between softmaxes at `temperature` T. The factor T^2 keeps the scale
    of the gradient (Hinton et al., 1503.02531). Gradients flow to `hidden` and to those parameters of the student's head
    that require them.

    Raises:
        ValueError: vocabularies of different sizes, an unknown divergence, or `ce_weight` without targets.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence {divergence!r} is unknown; choose one of {', '.join(DIVERGENCES)}")
    if ce_weight and targets is None:
        raise ValueError(f"ce_weight is {ce_weight}, but there are no targets")
    if head.call is not None or teacher_head.call is not None:
        return called_kl(hidden, head, teacher_hidden, teacher_head, weights, targets, divergence, temperature, ce_weight)
    assert head.weight is not None and teacher_head.weight is not None, "a head needs a weight or a call"
    check_vocabularies(head.weight.shape[0], teacher_head.weight.shape[0])
    run = pick("linear_kl", IMPLEMENTATIONS, hidden, computes=compute_type(hidden), checked=CHECKED["linear_kl"])
    return run(hidden, head, teacher_hidden, teacher_head, weights, targets, divergence, temperature, ce_weight)
