"""LM head loss for cached top-k distributions: KL over the k most likely tokens and one bucket with all others.

A cached distribution p has the probabilities of k tokens and the mass of the rest. The student's q is summed into the same
k + 1 buckets, and the loss is the KL between the buckets. By the data-processing inequality this is a lower bound of
KL(p || q). It equals KL(p || q) if p and q have the same shares within the rest, and does not depend on these shares.

Gradients are computed in the forward pass, since the loss is the last operation of the graph. Then a chunk's logits are
freed.
"""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from students.kernels import compute_type
from students.kernels.linear_kl.head import Head
from students.kernels.linear_kl.products import GradientsKept, accumulate, product
from students.kernels.linear_kl.reference import CHUNK, in_pieces, logits_of
from students.shapes import Float, Int

BYTES = 2**29  # of the logits that are in memory at the same time


def sparse_kl(
    hidden: Float[Tensor, "t d"],
    head: Head,
    ids: Int[Tensor, "t k"],
    logs: Float[Tensor, "t k"],
    rest: Float[Tensor, " t"],
    weights: Float[Tensor, " t"],
    targets: Int[Tensor, " t"] | None = None,
    *,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    rows: int | None = None,
) -> Float[Tensor, ""]:
    """Compute the weighted mean of the bucketed KL and cross-entropy over tokens, in nats.

    The loss is sum_t weights_t ((1 - ce_weight) T^2 KL_t + ce_weight CE(targets_t)) / sum_t weights_t, where KL_t is between
    the k + 1 buckets: the tokens of `ids`, and all others together. It is a lower bound of the KL over the vocabulary.

    Args:
        head: the student's `Head`. ids: distinct tokens for each position. logs, rest: logarithms of their probabilities and
            of the mass of all others, at `temperature` T; they are normalised here, since float16 rounds them. rows: tokens
            whose logits are in memory at the same time (default: by memory).

    Raises:
        ValueError: `ce_weight` without targets.
    """
    if ce_weight and targets is None:
        raise ValueError(f"ce_weight is {ce_weight}, but there are no targets")
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logs, rest, weights = logs.to(wide), rest.to(wide), weights.to(wide)
    whole = torch.logaddexp(logs.logsumexp(-1), rest)
    logs, rest = logs - whole[:, None], rest - whole
    weights = weights / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)
    known = (ids, logs, rest, weights, targets, temperature, ce_weight)
    if head.call is not None:
        return _called(hidden, head, known, rows or CHUNK)
    assert head.weight is not None, "a head needs a weight or a call"
    rows = rows or max(128, BYTES // (4 * head.weight.shape[0]) // 128 * 128)
    return _SparseKL.apply(hidden, head.weight, head.bias, (head, known, rows))


def bucket_losses(
    logits: Float[Tensor, "t v"],
    ids: Int[Tensor, "t k"],
    logs: Float[Tensor, "t k"],
    rest: Float[Tensor, " t"],
    targets: Int[Tensor, " t"] | None,
    temperature: float,
    ce_weight: float,
) -> Float[Tensor, " t"]:
    """Compute each token's loss in plain operations: the definition of `sparse_kl`, used for heads with `call`."""
    losses: Tensor | float = 0.0
    if ce_weight < 1:
        cool = logits / temperature
        inside = cool.gather(-1, ids)
        outside = cool.scatter(-1, ids, -torch.inf).logsumexp(-1)
        whole = torch.logaddexp(inside.logsumexp(-1), outside)
        terms = logs.exp() * (logs - inside + whole[:, None])
        left = rest.exp() * (rest - outside + whole)
        losses = (1 - ce_weight) * temperature**2 * (terms.sum(-1) + torch.where(rest > -torch.inf, left, 0.0))
    if ce_weight:
        assert targets is not None, "a CE share needs targets"
        losses = losses + ce_weight * F.cross_entropy(logits, targets, reduction="none")
    return cast(Tensor, losses)


def _called(hidden: Tensor, head, known: tuple, rows: int) -> Tensor:
    """Compute the loss for a head with `call`; each chunk's logits are recomputed in the backward pass."""
    ids, logs, rest, weights, targets, temperature, ce_weight = known

    def chunk_loss(states: Tensor, start: int) -> Tensor:
        piece = slice(start, start + rows)
        wanted = None if targets is None else targets[piece]
        logits = logits_of(states, head).to(logs.dtype)
        return (
            weights[piece] * bucket_losses(logits, ids[piece], logs[piece], rest[piece], wanted, temperature, ce_weight)
        ).sum()

    return in_pieces(chunk_loss, hidden, rows)


class _SparseKL(GradientsKept):
    """The loss with its gradients, chunk by chunk: one array holds a chunk's logits and then, in place, their gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rest):
        wanted, narrow = ctx.needs_input_grad[:3], hidden.to(compute_type(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            head, known, rows = rest
            loss, ctx.grads = _run(narrow, weight, bias, head, known, rows, wanted)
        ctx.op, ctx.types = "sparse_kl", (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss


def _run(hidden, weight, bias, head, known, rows, wanted):
    ids, logs, rest, weights, targets, temperature, ce_weight = known
    wide = torch.promote_types(hidden.dtype, torch.float32)
    narrow = weight.to(hidden.dtype)
    d_hidden = torch.zeros_like(hidden) if wanted[0] else None
    d_weight = torch.zeros(weight.shape, dtype=wide, device=hidden.device) if wanted[1] else None
    d_bias = torch.zeros(bias.shape, dtype=wide, device=hidden.device) if wanted[2] else None
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    for start in range(0, hidden.shape[0], rows):
        piece = slice(start, start + rows)
        states = hidden[piece]
        logits = product(states, narrow.t(), states.new_empty((len(states), len(weight)), dtype=wide))
        if bias is not None:
            logits += bias.to(wide)
        logits *= head.scale
        if head.softcap is not None:
            logits.div_(head.softcap).tanh_().mul_(head.softcap)
        capped = logits.clone() if head.softcap is not None and any(wanted) else None
        label = None if targets is None else targets[piece, None]
        losses = _losses_and_gradient(logits, ids[piece], logs[piece], rest[piece], label, temperature, ce_weight)
        loss += (weights[piece] * losses).sum()
        if not any(wanted):
            continue
        logits *= head.scale * weights[piece, None]
        if capped is not None:
            logits *= 1 - (capped / head.softcap).square_()
        d_logits = logits.to(hidden.dtype)
        if d_hidden is not None:
            d_hidden[piece] = d_logits @ narrow
        if d_weight is not None:
            accumulate(d_weight, d_logits.t(), states)
        if d_bias is not None:
            d_bias += logits.sum(0)
    return loss, (d_hidden, d_weight, d_bias)


def _losses_and_gradient(z, ids, logs, rest, label, temperature, ce_weight) -> Tensor:
    """Compute the losses of a chunk's tokens; the logits z become d loss / d z in place.

    Let q be the student's buckets and s its shares within the rest. d KL / d (z / T) is q - p at the known tokens and
    s (q_rest - p_rest) at the others: the gradient changes the mass of the rest, but not the shares within it.
    """
    sharp = z.log_softmax(-1) if ce_weight and (temperature != 1.0 or ce_weight == 1) else None  # for CE at T = 1
    own = z.gather(-1, label)[:, 0] if ce_weight else None
    z /= temperature
    inside = z.gather(-1, ids)
    z.scatter_(-1, ids, -torch.inf)
    top = z.amax(-1, keepdim=True)
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    outside = (top + total.log())[:, 0]
    whole = torch.logaddexp(inside.logsumexp(-1), outside)
    log_q, log_rest = inside - whole[:, None], outside - whole
    p, p_rest, q, q_rest = logs.exp(), rest.exp(), log_q.exp(), log_rest.exp()
    left = torch.where(rest > -torch.inf, p_rest * (rest - log_rest), 0.0)
    kl = (p * (logs - log_q)).sum(-1) + left
    share, size = 1 - ce_weight, share_of(temperature, ce_weight)
    warm = ce_weight if ce_weight and sharp is None else 0.0  # CE at T = 1 has the same softmax
    z.mul_(((size + warm) * q_rest - size * p_rest)[:, None] / total)
    z.scatter_(-1, ids, (size + warm) * q - size * p)
    losses = share * temperature**2 * kl
    if own is None:
        return losses
    if sharp is not None:
        losses = losses - ce_weight * sharp.gather(-1, label)[:, 0]
        z.add_(sharp.exp_(), alpha=ce_weight)
    else:
        losses = losses + ce_weight * (whole - own)
    z.scatter_add_(-1, label, torch.full_like(own, -ce_weight)[:, None])
    return losses


def share_of(temperature: float, ce_weight: float) -> float:
    """Returns the factor of d KL / d (z / T) in d loss / d z: (1 - ce_weight) T^2 / T."""
    return (1 - ce_weight) * temperature
