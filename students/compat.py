"""Parts of transformers and torch that are private, or whose names differ between versions, collected in this file.

Each note names the versions of transformers (or torch) in which the part was checked. Overridden methods and class
attributes stay with the classes that override them, with the same note.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import AttentionInterface, GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward as own_sdpa  # 5.17, 5.24
from transformers.masking_utils import sdpa_mask as own_sdpa_mask  # 5.17, 5.24
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # 5.17, 5.24: the table of implementations
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # these three: 5.17, 5.24, in no documentation
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput

from students.shapes import Int

__all__ = [
    "CACHE",
    "CONFIG_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "accelerate_hook",
    "add_attention",
    "attention_implementation",
    "attention_replaced",
    "brings_code",
    "cudnn_attention",
    "experts_for_decoding",
    "fake_tensors",
    "flash_attention",
    "has_global_hooks",
    "mask_width",
    "own_sdpa",
    "own_sdpa_mask",
    "pad_token",
    "prefill",
    "real_tensors",
    "set_attention_implementation",
    "set_seen_tokens",
    "takes_attention",
]

# The name of a model's cache among forward's arguments: `past_key_values` in 5.17, `cache` from 5.24 on.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


def brings_code(config: PretrainedConfig) -> bool:
    """Whether saving a config also saves its class's code, because the config was loaded with it. 5.17, 5.24."""
    return config._auto_class is not None


def accelerate_hook(module: nn.Module) -> Any:
    """The hook by which accelerate (1.1 to 1.15) loads a module's parameters; None without one."""
    return module.__dict__.get("_hf_hook")


def attention_implementation(config: PretrainedConfig) -> str | None:
    """The attention implementation of a config ("sdpa", "eager" ...); None before one is chosen. 5.17, 5.24."""
    return config._attn_implementation


def set_attention_implementation(config: PretrainedConfig, name: str | None) -> None:
    """Set the attention implementation of a config, without transformers' checks. 5.17, 5.24."""
    config._attn_implementation = name


def add_attention(name: str, function: Callable) -> None:
    """Add an attention that takes no masks to transformers' table, unless the name is there already. 5.17, 5.24."""
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, function)


@contextmanager
def attention_replaced(config: PretrainedConfig, name: str) -> Iterator[None]:
    """Inside the block, models of this config run the attention `name`. 5.17, 5.24."""
    original = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = original


def takes_attention(model: PreTrainedModel) -> bool:
    """Whether a model looks its attention up in `AttentionInterface` at each call. 5.17, 5.24."""
    return bool(model._supports_attention_backend)


def experts_for_decoding(model: PreTrainedModel) -> AbstractContextManager:
    """Inside the block, a mixture of experts runs as in token-by-token `generate`. 5.17, 5.24."""
    return cast(Any, model)._optimize_model_for_decode()


def prefill(model: PreTrainedModel, input_ids: Int[Tensor, "b t"], config: GenerationConfig, arguments: dict) -> ModelOutput:
    """The model's output for a prompt, chunked where `config` says so; the cache in `arguments` is filled. 5.17, 5.24."""
    return cast(Any, model)._prefill(input_ids, config, arguments)


def mask_width(config: GenerationConfig, mask: Tensor | None) -> int | None:
    """The width of the mask in a `generate`; from 5.24 on `generate` drops a mask without padding. 5.17, 5.24."""
    return getattr(config, "_mask_length", None) if mask is None else mask.shape[1]


def pad_token(config: GenerationConfig) -> Tensor | None:
    """The token with which `generate` fills finished rows, if any; `generate` sets it when it begins. 5.17, 5.24."""
    return config._pad_token_tensor


def set_seen_tokens(layer: CacheLayerMixin, tokens: int) -> None:
    """Set the number of tokens that a cache layer has seen; layers with sliding windows count them. 5.17, 5.24."""
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = tokens


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's attention and its log-sum-exp, without a backward pass. torch 2.11, 2.13."""
    made = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return made[0], made[1]


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's FlashAttention and its log-sum-exp; the causal mask is aligned at the last key. torch 2.11, 2.13."""
    made = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return made[0], made[1]


def has_global_hooks() -> bool:
    """Whether hooks for all modules are registered. `_has_any_global_hook`, torch 2.11, 2.13."""
    return bool(torch_module._has_any_global_hook())


def fake_tensors() -> AbstractContextManager:
    """Inside the block, new tensors have shapes and types but no data; real tensors may be mixed in. torch 2.11, 2.13."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def real_tensors() -> AbstractContextManager:
    """Inside the block, which is within one of `fake_tensors`, new tensors have data again. torch 2.11, 2.13."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()
