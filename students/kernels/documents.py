"""Packed documents: a row of a batch may hold several, and no state may pass from one to the next."""

import torch
from torch import Tensor

from students.shapes import Bool, Int


def runs(documents: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Number the runs of equal ids along time: 0, 1, 2 ... An id that comes back later is a new run."""
    changed = torch.zeros_like(documents)
    changed[:, 1:] = (documents[:, 1:] != documents[:, :-1]).to(documents.dtype)
    return changed.cumsum(1)


def random_documents(batch: int, time: int, device: str = "cpu") -> Int[Tensor, "b t"]:
    """Documents of random lengths, about 7 tokens each, another draw a row: for tests."""
    return (torch.rand(batch, time, device=device) < 0.15).long().cumsum(1)


def positions(documents: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """How many tokens of the same run stand before each token."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.zeros_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = torch.where(starts, index, torch.zeros_like(index)).cummax(1).values
    return index - first


def same_run(queries: Int[Tensor, "b q"], keys: Int[Tensor, "b k"]) -> Bool[Tensor, "b q k"]:
    """Whether each query and each key belong to one run."""
    return queries[:, :, None] == keys[:, None, :]
