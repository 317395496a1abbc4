"""Log-probabilities of given tokens under a head, in chunks: the logits of a batch never exist at once.

The logits of a chunk are computed again in the backward pass. The result can enter any differentiable function.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.text.windows import Batch
from students.kernels.linear_kl import Head
from students.kernels.linear_kl.reference import CHUNK, logits_of


def token_log_probabilities(hidden: Float[Tensor, "t d"], head: Head, targets: Int[Tensor, " t"]) -> Float[Tensor, " t"]:
    """log p(target) of each token, in nats and float32 or wider.

    Args:
        hidden: last hidden states. targets: the next tokens.
    """

    def piece(states: Tensor, wanted: Tensor) -> Tensor:
        logits = logits_of(states, head)
        return logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(-1)

    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([checkpoint(piece, states, wanted, use_reentrant=False) for states, wanted in parts])


def cross_entropy(hidden: Float[Tensor, "b t d"], head: Head, batch: Batch) -> Float[Tensor, ""]:
    """The mean of -log p(next token), weighted by the batch's `loss_weights`; 0 where these are all 0."""
    weights = batch.loss_weights.flatten()
    found = token_log_probabilities(hidden.flatten(0, 1), head, batch.targets.flatten())
    return -(weights * found).sum() / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)


def sequence_log_probabilities(hidden: Float[Tensor, "b t d"], head: Head, batch: Batch) -> Float[Tensor, " b"]:
    """The sum of log p(target) over the tokens that are trained on, of each window."""
    found = token_log_probabilities(hidden.flatten(0, 1), head, batch.targets.flatten())
    return (found.view_as(batch.targets) * batch.loss_weights).sum(-1)
