"""Parts of transformers that are private or documented nowhere: the one file that knows them.

Each names the versions that it was seen in.
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
    """The attention that a model of this config runs: "sdpa", "eager" ... 5.17, 5.24."""
    return config._attn_implementation


@contextmanager
def attention_replaced(config: PretrainedConfig, name: str) -> Iterator[None]:
    """Inside the block the config's models run the attention of that name. The models' own method would check whether the
    name is one that transformers brings. 5.17, 5.24."""
    original = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = original


def attention_function(name: str, module: nn.Module) -> Callable:
    """An implementation's function as an attention module calls it. "eager" is none of the table: it is a function of the
    file that the module's class stands in. 5.17, 5.24."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def knows_windows(module: nn.Module) -> bool:
    """Whether an attention may slide: a config may have a `sliding_window` that its models, Llama's say, never read. 5.17,
    5.24: the file that the class stands in names it."""
    return "sliding_window" in inspect.getsource(sys.modules[type(module).__module__])


def add_attention(name: str, function: Callable, masks_of: str) -> None:
    """Add an implementation to transformers' table, with the masks of another; once it is there, nothing happens."""
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks_of])


def rotary_frequencies(kind: str, config: PretrainedConfig) -> Tensor:
    """The frequencies that a kind of scaling ("llama3" ...) makes of a config's rotary embedding. 5.17, 5.24."""
    return ROPE_INIT_FUNCTIONS[kind](config)[0]


def forget_lengths(model: nn.Module) -> None:
    """Let a dynamic rotary embedding be that of each call's own length: it would go on with the factors of the longest text
    that it has ever seen. 5.17, 5.24."""
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached") and "dynamic" in str(getattr(module, "rope_type", "")):
            module.register_forward_pre_hook(_forget)


def _forget(module: nn.Module, arguments: tuple) -> None:
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:  # one a kind of layer
        setattr(module, name, 0)
