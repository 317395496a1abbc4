"""Calibration, and how alike two models rank the next token."""

import torch
from jaxtyping import Float
from torch import Tensor

BINS = 15
TOP, LIST = 5, 10  # of the overlap, and of the rank correlation


def calibration_error(
    confidence: Float[Tensor, "..."], correct: Float[Tensor, "..."], weight: Float[Tensor, "..."]
) -> float:
    """Expected calibration error of next-token prediction (arXiv 1706.04599).

    Tokens fall into 15 equal bins by the probability of the model's first choice; the error is the mean over tokens of
    |share of first choices that were the next token of the text - mean probability of the first choice| of their bin.
    0 is calibrated; a model that is always sure and never right has 1.
    """
    bins = (confidence * BINS).long().clamp(0, BINS - 1).flatten()
    gap = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, ((correct - confidence) * weight).double().flatten())
    return (gap.abs().sum() / weight.sum().clamp_min(1.0)).item()


def rank_agreement(student: Float[Tensor, "t v"], teacher: Float[Tensor, "t v"]) -> dict[str, Float[Tensor, " t"]]:
    """How alike two models order the vocabulary, token by token.

    Returns:
        rank: the place of the teacher's first choice in the student's order, 1 being the first. overlap: the share of the
        teacher's five first choices that are among the student's five. kendall: Kendall's tau of the student's order of
        the teacher's ten first choices, 1 for the same order, -1 for the reverse.
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
