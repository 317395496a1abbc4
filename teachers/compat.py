"""Access to private or undocumented parts of transformers; no other file of this package uses them.

Each entry names the versions of transformers in which it was checked.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # 5.17, 5.24: the masks of each implementation
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # 5.17, 5.24: the frequencies of each kind of scaling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # 5.17, 5.24: the table of implementations


def attention_implementation(config: PretrainedConfig) -> str:
    """Returns the attention implementation of a config's model: "sdpa", "eager" ... 5.17, 5.24."""
    return config._attn_implementation


@contextmanager
def attention_replaced(config: PretrainedConfig, name: str) -> Iterator[None]:
    """Inside the block, models of this config run the attention implementation `name`.

    The models' own method accepts only names that come with transformers. 5.17, 5.24.
    """
    original = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = original


def attention_function(name: str, module: nn.Module) -> Callable:
    """Returns the function of an attention implementation, as an attention module calls it.

    "eager" is not in transformers' table: it is a function of the file that defines the module's class. 5.17, 5.24.
    """
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def knows_windows(module: nn.Module) -> bool:
    """Returns whether an attention module supports sliding windows: whether the file of its class mentions `sliding_window`.

    A config may have a `sliding_window` that its models, such as Llama's, never read. 5.17, 5.24.
    """
    return "sliding_window" in inspect.getsource(sys.modules[type(module).__module__])


def add_attention(name: str, function: Callable, masks_of: str) -> None:
    """Add an attention implementation to transformers' table, with the masks of the implementation `masks_of`.

    A name that is in the table already is left unchanged.
    """
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks_of])


def rotary_frequencies(kind: str, config: PretrainedConfig) -> Tensor:
    """Returns the rotary frequencies of a config under a kind of scaling ("llama3" ...). 5.17, 5.24."""
    return ROPE_INIT_FUNCTIONS[kind](config)[0]


def forget_lengths(model: nn.Module) -> None:
    """Let a dynamic rotary embedding use the length of each call.

    Without this it keeps the factors of the longest sequence so far. 5.17, 5.24.
    """
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached") and "dynamic" in str(getattr(module, "rope_type", "")):
            module.register_forward_pre_hook(_forget)


def _forget(module: nn.Module, arguments: tuple) -> None:
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:  # one for each kind of layer
        setattr(module, name, 0)
