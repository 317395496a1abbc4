"""Packed documents: document ids of the tokens of a batch, for rows with several documents and for padding.

No state passes from one document to the next. A run is a sequence of neighbouring tokens with the same id.
"""

import torch
from torch import Tensor

from students.shapes import Bool, Int


def runs(documents: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Number the runs of equal ids along time: 0, 1, 2 ... An id that occurs again later begins a new run."""
    changed = torch.zeros_like(documents)
    changed[:, 1:] = (documents[:, 1:] != documents[:, :-1]).to(documents.dtype)
    return changed.cumsum(1)


def random_documents(batch: int, time: int, device: str = "cpu") -> Int[Tensor, "b t"]:
    """Draw documents of random lengths, about 7 tokens on average, separately for each row; for tests."""
    return (torch.rand(batch, time, device=device) < 0.15).long().cumsum(1)


def positions(documents: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Returns the position of each token in its run, from 0."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.zeros_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = torch.where(starts, index, torch.zeros_like(index)).cummax(1).values
    return index - first


def same_run(queries: Int[Tensor, "b q"], keys: Int[Tensor, "b k"]) -> Bool[Tensor, "b q k"]:
    """Returns whether each query and each key have the same id."""
    return queries[:, :, None] == keys[:, None, :]


def restarts(positions: Int[Tensor, "rows t"]) -> Int[Tensor, "rows t"]:
    """Number documents by their positions: a new document begins wherever the position does not increase by one."""
    starts = torch.zeros_like(positions)
    starts[:, 1:] = (positions.diff(dim=1) != 1).to(positions.dtype)
    return starts.cumsum(1)


PADDING = -1  # the document id and the position of padding
NOWHERE = torch.iinfo(torch.long).min  # the document id of an empty place, reserved for a later token
MARK = -(2**30)  # the position of padding in `marked_positions`; no token has it


def marked_positions(positions: Int[Tensor, "rows t"], documents: Int[Tensor, "b t"], packed: bool) -> Int[Tensor, "b t"]:
    """Returns positions from which `documents_of` recovers the documents; padding has the position MARK.

    For families whose layers drop unknown keyword arguments but pass positions on to their attention. If the documents come
    from a padding mask (one document per row) and are not packed, the positions are int32: the type alone tells which.
    """
    marked = torch.where(documents < 0, MARK, positions.expand_as(documents))
    return marked if packed else marked.int()


def documents_of(positions: Int[Tensor, "rows t"], batch: int, continued: bool) -> Int[Tensor, "b t"] | None:
    """Returns the documents of `marked_positions`: padding is -1, packed documents are numbered by `restarts`.

    continued: whether the tokens continue a cache, whose rows hold one document each. Then the result is None for positions
    that are not int32.
    """
    one_each = positions.dtype == torch.int32
    if continued and not one_each:
        return None
    positions = positions.expand(batch, -1)
    documents = torch.zeros_like(positions, dtype=torch.long) if one_each else restarts(positions)
    return torch.where(positions == MARK, torch.full_like(documents, PADDING), documents)
