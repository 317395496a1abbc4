"""The LM head loss in PyTorch, chunk by chunk: a chunk's logits are freed once its gradients are computed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from students.kernels.linear_kl.head import Head

CHUNK = 1024  # tokens whose logits are in memory at the same time


def linear_kl(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    weights: Tensor,
    targets: Tensor | None,
    divergence: str,
    temperature: float,
    ce_weight: float,
) -> Tensor:
    """See `students.kernels.linear_kl.linear_kl`."""
    rest = (head, teacher_hidden, teacher_head, weights, targets, divergence, temperature, ce_weight)
    return _LinearKL.apply(hidden, head.weight, head.bias, rest)


def called_kl(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    weights: Tensor,
    targets: Tensor | None,
    divergence: str,
    temperature: float,
    ce_weight: float,
) -> Tensor:
    """Compute `linear_kl` for heads with `call`; each chunk's logits are recomputed in the backward pass."""
    weights = weights / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)

    def chunk_loss(states: Tensor, start: int) -> Tensor:
        piece = slice(start, start + CHUNK)
        logits = logits_of(states, head)
        with torch.no_grad():
            teacher = logits_of(teacher_hidden[piece], teacher_head).to(logits.dtype)
        check_vocabularies(logits.shape[-1], teacher.shape[-1])
        wanted = None if targets is None else targets[piece]
        return (weights[piece] * _token_losses(logits, teacher, wanted, divergence, temperature, ce_weight)).sum()

    return in_pieces(chunk_loss, hidden, CHUNK)


def in_pieces(chunk_loss: Callable[[Tensor, int], Tensor], hidden: Tensor, rows: int) -> Tensor:
    """Sum `chunk_loss(states, start)` over chunks of `rows` tokens; each chunk is recomputed in the backward pass."""
    starts = range(0, hidden.shape[0], rows)
    losses = [checkpoint(chunk_loss, hidden[at : at + rows], at, use_reentrant=False) for at in starts]
    return torch.stack(losses).sum() if losses else hidden.sum().float()


def check_vocabularies(student: int, teacher: int) -> None:
    """Refuse heads of different sizes.

    Raises:
        ValueError: naming both.
    """
    if student != teacher:
        raise ValueError(
            f"the student's vocabulary has {student} entries and the teacher's {teacher}: "
            "logits can only be compared over one vocabulary"
        )


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """Compute the head's logits of some tokens, in float32 or wider."""
    logits = head.logits(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute KL(teacher || student) of each token, from log-probabilities."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute KL(student || teacher) of each token, from log-probabilities."""
    return forward_kl(teacher, student)


def jsd(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence of each token, from log-probabilities."""
    middle = torch.logaddexp(student, teacher) - math.log(2)
    return 0.5 * (forward_kl(middle, teacher) + forward_kl(middle, student))


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


class _LinearKL(torch.autograd.Function):
    """The loss with its gradients, which the forward pass computes chunk by chunk and keeps in place of the logits.

    This is possible because the loss is the last operation of the graph.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, rest):
        head, teacher_hidden, teacher_head, weights, targets, divergence, temperature, ce_weight = rest
        weights = weights / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)
        wanted = [hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        d_hidden = torch.zeros_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        d_bias = torch.zeros_like(bias, dtype=wide) if wanted[2] else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], CHUNK):
            piece = slice(start, start + CHUNK)
            raw = F.linear(hidden[piece], weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
            with torch.enable_grad():
                leaf = raw.to(wide).requires_grad_(any(wanted))
                logits = leaf * head.scale
                logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
                teacher = logits_of(teacher_hidden[piece], teacher_head)
                terms = _token_losses(
                    logits,
                    teacher.to(wide),
                    None if targets is None else targets[piece],
                    divergence,
                    temperature,
                    ce_weight,
                )
                chunk_loss = (weights[piece] * terms).sum()
            loss += chunk_loss.detach()
            if any(wanted):
                (d_logits,) = torch.autograd.grad(chunk_loss, leaf)
                d_logits = d_logits.to(hidden.dtype)
                if d_hidden is not None:
                    d_hidden[piece] = d_logits @ weight.to(hidden.dtype)
                if d_weight is not None:
                    d_weight += d_logits.t() @ hidden[piece]
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
        ctx.grads = (d_hidden, d_weight, d_bias)
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        grads = [None if g is None else (d_loss * g).to(t) for g, t in zip(ctx.grads, ctx.types, strict=True)]
        return (*grads, None)


def _token_losses(logits, teacher, targets, divergence, temperature, ce_weight):
    losses: Tensor | float = 0.0
    if ce_weight < 1:
        student_log = (logits / temperature).log_softmax(-1)
        teacher_log = (teacher / temperature).log_softmax(-1)
        losses = (1 - ce_weight) * temperature**2 * DIVERGENCES[divergence](student_log, teacher_log)
    if ce_weight:
        losses = losses + ce_weight * F.cross_entropy(logits, targets, reduction="none")
    return losses
