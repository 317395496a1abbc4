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


def restarts(positions: Int[Tensor, "rows t"]) -> Int[Tensor, "rows t"]:
    """Number documents by their positions: where they do not go on by one, the next begins."""
    starts = torch.zeros_like(positions)
    starts[:, 1:] = (positions.diff(dim=1) != 1).to(positions.dtype)
    return starts.cumsum(1)


PADDING = -1  # the position, and the document, of a token that is none
NOWHERE = torch.iinfo(torch.long).min  # the document of a place kept for a token that has not come yet
MARK = -(2**30)  # the position of padding, where positions have to say what is padding: no token's


def marked_positions(positions: Int[Tensor, "rows t"], documents: Int[Tensor, "b t"], packed: bool) -> Int[Tensor, "b t"]:
    """Positions that documents can be read off again, padding marked in them.

    For families whose layers drop unknown keywords but hand positions on to their attention. What comes from a mask, one
    document a row, is told from packed documents by its type, which needs no look at values: 32 bits.
    """
    marked = torch.where(documents < 0, MARK, positions.expand_as(documents))
    return marked if packed else marked.int()


def documents_of(positions: Int[Tensor, "rows t"], batch: int, continued: bool) -> Int[Tensor, "b t"] | None:
    """The reverse of `marked_positions`: padding is -1; packed documents are told apart by `restarts`.

    continued: the tokens go on with a cache, whose rows hold one document each; None where all of these do.
    """
    one_each = positions.dtype == torch.int32
    if continued and not one_each:
        return None
    positions = positions.expand(batch, -1)
    documents = torch.zeros_like(positions, dtype=torch.long) if one_each else restarts(positions)
    return torch.where(positions == MARK, torch.full_like(documents, PADDING), documents)
