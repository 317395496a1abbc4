"""The chunks of a prompt: their size follows from the memory that a chunk's activations, and its attention, need."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from students.compat import attention_implementation
from students.key_blocks import UNIT
from students.padding import last_columns
from students.prompt_attention import serves
from students.shapes import Float, Int

ROOM = {"cuda": 768 * 2**20}  # bytes of a chunk's activations, by estimate; 0.5 GiB were measured on Llama-3.2-1B
SMALL_ROOM = 64 * 2**20  # on a CPU, where smaller matrix products are as fast
MASKS = 512 * 2**20  # bytes of masks, or of eager attention's logits, where a chunk needs them
WIDEST, NARROWEST = 16_384, 32  # columns of a chunk
ALIGNED = 64  # larger chunks are multiples of this: scans work in chunks of that size


@dataclass(frozen=True)
class Prompt:
    """The columns [b t] of a prompt, as tokens or embeddings, after `past` columns in a cache.

    attention_mask [b past + t] and position_ids [rows n] are those of `forward`; of position_ids the last t columns count.
    """

    tokens: Int[Tensor, "b t"] | Float[Tensor, "b t d"]
    past: int = 0
    attention_mask: Int[Tensor, "b s"] | None = None
    position_ids: Int[Tensor, "rows n"] | None = None

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def columns(self) -> int:
        return self.tokens.shape[1]

    def piece(self, start: int, end: int) -> dict[str, Tensor]:
        """The arguments of `forward` for the columns from `start` to `end`."""
        name = "input_ids" if self.tokens.dim() == 2 else "inputs_embeds"
        arguments = {name: self.tokens[:, start:end]}
        if self.attention_mask is not None:
            arguments["attention_mask"] = self.attention_mask[:, : self.past + end]
        if self.position_ids is not None:
            width = self.position_ids.shape[-1]
            begins = width - self.columns + start
            arguments["position_ids"] = self.position_ids[..., begins : begins + end - start]
        return arguments


def cuts(model: PreTrainedModel, prompt: Prompt, chunk: int | None) -> list[tuple[int, int]]:
    """The first column of each chunk, and the column after its last one.

    By default each row's last token is in the last chunk: a prompt with a row that ends in padding is not cut.
    """
    if chunk is not None:
        if chunk < 1:
            raise ValueError(f"chunk is {chunk} tokens; it should be 1 or more")
        size = chunk
    elif prompt.columns <= NARROWEST or _ends_in_padding(prompt):
        size = prompt.columns
    else:
        weight = embeddings_of(model)
        size = chunk_columns(model.config, prompt.rows, weight.device, weight.element_size())
        size = min(size, _masked(model, prompt)) if size < prompt.columns else size
    return [(start, min(start + size, prompt.columns)) for start in range(0, prompt.columns, size)]


def embeddings_of(model: PreTrainedModel) -> Tensor:
    """The token embeddings of a model; their device and type stand for those of the model."""
    return cast(Tensor, model.get_input_embeddings().weight)


def _masked(model: PreTrainedModel, prompt: Prompt) -> int:
    """The most columns of a chunk where attention stores a mask, or its logits, of chunk x keys numbers."""
    if serves(model, prompt.attention_mask):
        return prompt.columns
    config = model.config.get_text_config(decoder=True)
    each = 3 if attention_implementation(config) == "sdpa" else 8 * config.num_attention_heads
    return _rounded(MASKS // (each * prompt.rows * (prompt.past + prompt.columns)))


def _rounded(columns: int) -> int:
    if columns < ALIGNED:
        return NARROWEST
    return 1 << (columns.bit_length() - 1) if columns >= UNIT else columns // ALIGNED * ALIGNED


def _ends_in_padding(prompt: Prompt) -> bool:
    return prompt.attention_mask is not None and last_columns(prompt.attention_mask.bool()) is not None


def chunk_columns(config: PretrainedConfig, rows: int, device: torch.device, itemsize: int) -> int:
    """The default columns of a chunk for a batch of `rows`: about half a GiB of activations on a GPU."""
    config = config.get_text_config(decoder=True)
    width = config.hidden_size
    inner = next(
        (size for name in ("intermediate_size", "ffn_hidden_size", "n_inner") if (size := getattr(config, name, 0))), 0
    )
    inner = (inner or 4 * width) * (getattr(config, "num_experts_per_tok", None) or 1)
    tokens = ROOM.get(device.type, SMALL_ROOM) // ((3 * inner + 10 * width) * itemsize)
    return _rounded(min(tokens, WIDEST) // max(rows, 1))
