"""Kept attention of a chunk of a prompt: the chunk's queries attend to all keys so far, without a mask of chunk x keys.

transformers passes PyTorch a mask of chunk x keys numbers. Late in a long prompt it takes gigabytes, and it excludes the
fastest kernels. A chunk's queries are at the positions of the last keys, so a kernel with a causal mask aligned at the last
key needs no such tensor. With padding on the left, this project's kernel treats the padding as a separate document.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from students.compat import (
    attention_implementation,
    own_sdpa,
    own_sdpa_mask,
    set_attention_implementation,
    takes_attention,
)
from students.kernels.attention import attention
from students.kernels.attention.reference import SAFE
from students.key_blocks import in_blocks
from students.key_blocks import serves as blocks_serve
from students.shapes import Bool, Float, Int

NAME = "distill_prompt"
HALF = (torch.float16, torch.bfloat16)


def serves(model: PreTrainedModel, attention_mask: Int[Tensor, "b s"] | None) -> bool:
    """Whether a model's kept attention can work without a mask of chunk x keys; otherwise transformers makes the mask."""
    config = model.config.get_text_config(decoder=True)
    if not takes_attention(model) or attention_implementation(config) != "sdpa":
        return False
    return attention_mask is None or _padded_in_front(attention_mask.bool())


@contextmanager
def prompt_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, a model's kept attention is `attend`; see `serves` for the models that support it."""
    config = model.config.get_text_config(decoder=True)
    original = attention_implementation(config)
    set_attention_implementation(config, NAME)
    try:
        yield
    finally:
        set_attention_implementation(config, original)


def attend(
    module: nn.Module,
    query: Float[Tensor, "b h t p"],
    key: Float[Tensor, "b kv s p"],
    value: Float[Tensor, "b kv s p"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Float[Tensor, "b t h p"], None]:
    """Attention of a chunk, with the signature of transformers' attention functions; the mask is from `mask_of`."""
    time, keys = query.shape[2], key.shape[2]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and attention_mask.dim() == 2:
        heads = (part.transpose(1, 2) for part in (query, key, value))
        return attention(*heads, scale=scaling, documents=attention_mask.long() - 1), None
    if attention_mask is not None or time in (1, keys) or rest.get("position_bias") is not None:
        if attention_mask is None and time not in (1, keys):
            attention_mask = torch.ones(time, keys, dtype=torch.bool, device=query.device).tril(keys - time)[None, None]
        return own_sdpa(module, query, key, value, attention_mask, scaling=scaling, **rest)
    if torch.is_autocast_enabled(query.device.type):  # autocast does not reach the operations below
        kind = torch.get_autocast_dtype(query.device.type)
        query, key, value = (part.to(kind) for part in (query, key, value))
    if query.dtype in HALF and blocks_serve(query, key, value):
        return in_blocks(query, key, value, scaling).transpose(1, 2).contiguous(), None
    grouped = key.shape[1] != query.shape[1]
    if grouped and query.dtype not in HALF:  # only the kernel for half precision has groups and such a mask
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        grouped = False
    with sdpa_kernel(SAFE):
        mask = causal_lower_right(time, keys)
        y = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=grouped)
    return y.transpose(1, 2).contiguous(), None


def mask_of(
    *,
    kv_length: int,
    kv_offset: int = 0,
    attention_mask: Bool[Tensor, "b s"] | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **rest: Any,
) -> Tensor | None:
    """The mask for `attend`: None, the 2-D mask [b s] of padded rows, or the full mask of a window or another pattern."""
    if local_size is not None or not allow_is_causal_skip:
        return own_sdpa_mask(
            kv_length=kv_length,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            **rest,
        )
    return None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]


def _padded_in_front(real: Bool[Tensor, "b s"]) -> bool:
    """Whether no row has padding after a token."""
    return not bool((real[:, :-1] & ~real[:, 1:]).any())


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask_of)
