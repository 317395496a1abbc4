"""Calibration error, and agreement between two models' rankings of the next token."""

import torch
from jaxtyping import Float
from torch import Tensor

BINS = 15
TOP, LIST = 5, 10  # tokens in the overlap, and in the rank correlation


def calibration_error(
    confidence: Float[Tensor, "..."], correct: Float[Tensor, "..."], weight: Float[Tensor, "..."]
) -> float:
    """Return the expected calibration error of next-token prediction (arXiv 1706.04599).

    Positions fall into 15 equal bins by the probability of the model's most likely token. The error is the mean over
    positions of their bin's |share of most likely tokens that are the text's next token - mean probability of the most
    likely token|. 0 is calibrated; a model that is always sure and never right has 1.
    """
    bins = (confidence * BINS).long().clamp(0, BINS - 1).flatten()
    gap = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, ((correct - confidence) * weight).double().flatten())
    return (gap.abs().sum() / weight.sum().clamp_min(1.0)).item()


def rank_agreement(student: Float[Tensor, "t v"], teacher: Float[Tensor, "t v"]) -> dict[str, Float[Tensor, " t"]]:
    """Compare how two models rank the vocabulary, position by position.

    Returns:
        rank: the rank of the teacher's most likely token with the student, from 1. overlap: the share of the teacher's five
        most likely tokens that are among the student's five. kendall: Kendall's tau of the student's order of the teacher's
        ten most likely tokens, 1 for the same order, -1 for the reverse.
    """
    top = teacher.topk(min(LIST, teacher.shape[-1])).indices
    scores = student.gather(-1, top)
    own = student.topk(min(TOP, student.shape[-1])).indices
    first, second = torch.triu_indices(top.shape[1], top.shape[1], 1, device=top.device)
    return {
        "rank": 1.0 + (student > scores[:, :1]).sum(-1).float(),
        "overlap": (own[:, :, None] == top[:, None, : own.shape[1]]).any(-1).float().mean(-1),
        "kendall": (scores[:, first] - scores[:, second]).sign().float().mean(-1),
    }
