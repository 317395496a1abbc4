"""The inputs of a student, checked: tokens, their positions, and the document that each token belongs to."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from students.kernels.documents import positions, restarts, runs
from students.shapes import Float, Int


@dataclass(frozen=True)
class Inputs:
    """Tokens or their embeddings, with mask, positions, cache and documents.

    documents: None where every row is one document without padding.
    """

    input_ids: Int[Tensor, "b t"] | None
    inputs_embeds: Float[Tensor, "b t d"] | None
    attention_mask: Int[Tensor, "b s"] | None = None
    position_ids: Int[Tensor, "rows t"] | None = None
    cache: Cache | None = None
    documents: Int[Tensor, "b t"] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Rows and tokens."""
        rows, tokens = cast(Tensor, self.inputs_embeds if self.input_ids is None else self.input_ids).shape[:2]
        return rows, tokens


def checked(
    input_ids: Int[Tensor, "b t"] | None,
    inputs_embeds: Float[Tensor, "b t d"] | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Int[Tensor, "rows t"] | None = None,
    cache: Cache | None = None,
    document_ids: Int[Tensor, "b t"] | None = None,
) -> Inputs:
    """The inputs of a call; documents are read from `document_ids`, the mask or the positions.

    Raises:
        ValueError: a mask that is not 2-D or not as wide as the sequence, or document ids together with a mask or a cache.
    """
    inputs = Inputs(input_ids, inputs_embeds)
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        raise ValueError("a student takes a 2-D attention_mask (1 for tokens, 0 for padding), or document_ids")
    if document_ids is not None and (attention_mask is not None or cache is not None):
        raise ValueError("document_ids pack documents for training; with a mask or a cache pass attention_mask alone")
    rows, time = inputs.size
    documents = None
    if document_ids is not None:
        documents = torch.where(
            document_ids < 0, document_ids, runs(document_ids)
        )  # an id that occurs again later is a new document
        position_ids = positions(documents) if position_ids is None else position_ids
    elif attention_mask is not None:
        _check_width(attention_mask, time, cache)
        documents = mask_documents(attention_mask, time)
    elif position_ids is not None and cache is None:
        documents = _packed(position_ids, rows)
    return Inputs(input_ids, inputs_embeds, attention_mask, position_ids, cache, documents)


def mask_documents(attention_mask: Int[Tensor, "b s"], time: int) -> Int[Tensor, "b t"] | None:
    """The documents of the last `time` columns: 0 for tokens, -1 for padding; None where all are tokens of begun sequences.

    Reads the mask, which waits for the GPU.
    """
    new, before = attention_mask[:, -time:].bool(), attention_mask[:, :-time].bool()
    whole = new.all() if before.shape[1] == 0 else new.all() & before.any(1).all()
    return None if bool(whole) else new.long() - 1


def _check_width(attention_mask: Int[Tensor, "b s"], time: int, cache: Cache | None) -> None:
    past = 0 if cache is None else cache.get_seq_length()
    if attention_mask.shape[1] != past + time:
        behind = f" after {past} in the cache" if past else ""
        raise ValueError(
            f"the attention_mask is {attention_mask.shape[1]} wide, but there are {time} tokens{behind}; it has to cover "
            "all of them"
        )


def _packed(position_ids: Int[Tensor, "rows t"], batch: int) -> Int[Tensor, "b t"] | None:
    """Documents of packed rows, from positions that start again; None where they never do."""
    documents = restarts(position_ids)
    return documents.expand(batch, -1) if bool(documents[:, -1].any()) else None
