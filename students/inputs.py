"""What a student is asked to compute from, checked: tokens, their places, and the document each belongs to."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from students.kernels.documents import positions, restarts, runs
from students.shapes import Float, Int


@dataclass(frozen=True)
class Inputs:
    """Tokens or their embeddings, and where they stand. documents: None where every row is one, without padding."""

    input_ids: Int[Tensor, "b t"] | None
    inputs_embeds: Float[Tensor, "b t d"] | None
    attention_mask: Int[Tensor, "b s"] | None = None
    position_ids: Int[Tensor, "rows t"] | None = None
    cache: Cache | None = None
    documents: Int[Tensor, "b t"] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Rows and tokens."""
        return tuple((self.inputs_embeds if self.input_ids is None else self.input_ids).shape[:2])


def checked(
    input_ids: Int[Tensor, "b t"] | None,
    inputs_embeds: Float[Tensor, "b t d"] | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Int[Tensor, "rows t"] | None = None,
    cache: Cache | None = None,
    document_ids: Int[Tensor, "b t"] | None = None,
) -> Inputs:
    """The inputs of a call, each token's document read off what says it.

    Raises:
        ValueError: a mask that is not 2-D, document ids beside a mask or a cache, or padding behind a text that goes on.
    """
    inputs = Inputs(input_ids, inputs_embeds)
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        raise ValueError("a student takes a 2-D attention_mask (1 for tokens, 0 for padding), or document_ids")
    if document_ids is not None and (attention_mask is not None or cache is not None):
        raise ValueError("document_ids pack documents for training; with a mask or a cache use attention_mask alone")
    rows, time = inputs.size
    documents = None
    if document_ids is not None:
        documents = torch.where(
            document_ids < 0, document_ids, runs(document_ids)
        )  # an id that comes back is a new document
        position_ids = positions(documents) if position_ids is None else position_ids
    elif attention_mask is not None:
        if cache is None or _padded(attention_mask, time, cache):
            documents = attention_mask[:, -time:].long() - 1  # tokens 0, padding -1
    elif position_ids is not None and cache is None:
        documents = _packed(position_ids, rows)
    return Inputs(input_ids, inputs_embeds, attention_mask, position_ids, cache, documents)


def ends_in_padding(attention_mask: Int[Tensor, "b s"]) -> bool:
    """Whether some row's last token is none: no state can go on from there."""
    return not bool(attention_mask[:, -1].all())


def _padded(attention_mask: Int[Tensor, "b s"], time: int, past: Cache) -> bool:
    """Whether new tokens hold padding: only a prompt's beginning may. One token is never asked, the CPU would wait for it.

    Raises:
        ValueError: padding behind a text, which a state would go through.
    """
    begun = past.get_seq_length() > 0
    if (begun and time == 1) or bool(attention_mask[:, -time:].all()):
        return False
    if begun:
        raise ValueError("there is padding behind text that the cache holds: a student's state cannot leave it out")
    if ends_in_padding(attention_mask):
        raise ValueError(
            "the prompt, or its first chunk, ends in padding: generate with padding_side='left', and where there is a "
            "prefill_chunk_size, one larger than the padding"
        )
    return True


def _packed(position_ids: Int[Tensor, "rows t"], batch: int) -> Int[Tensor, "b t"] | None:
    """Documents, from positions that start again; None where they never do."""
    documents = restarts(position_ids)
    return documents.expand(batch, -1) if bool(documents[:, -1].any()) else None
