"""The bytes of a student's cache after a number of tokens, and the bytes that one token reads, from shapes alone.

Each kind of layer is run once on tensors without data, with the code that fills a real cache. A layer has a constant state,
or grows by the same number of bytes with every token once its longest window is full. Two lengths beyond that point
therefore give the bytes at any longer length.
"""

import functools
from typing import Any, cast

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from students.cache import MixerState
from students.compat import fake_tensors, real_tensors
from students.config import Layout
from students.entry import from_dict
from students.mixers.mixer import Context, Mixer, Shape
from students.mixers.sharing import SharedKeys

FILLED = 16  # tokens beyond which convolutions and other short memories are full
STEP = 8


def cache_bytes(layer: CacheLayerMixin) -> int:
    """Bytes of the tensors that one layer of a cache holds."""
    if isinstance(layer, MixerState):
        return sum(tensor.nbytes for tensor in layer.tensors.values())
    kept = (layer.keys, layer.values) if layer.is_initialized else ()
    return sum(tensor.nbytes for tensor in kept if tensor is not None)


def state_bytes(student: nn.Module, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of a student's cache for one sequence of `tokens` tokens, with weights in `dtype`.

    The weights may be on the meta device.
    """
    config: Any = student.config
    layout, _, shapes = from_dict(config.distill)
    kept, total = DynamicCache(config=config.get_text_config(decoder=True)).layers, 0
    tokens += layout.meta_tokens
    with torch.no_grad(), fake_tensors():
        kinds: dict[tuple, int] = {}
        for index, layer in enumerate(kept):
            shape, giver = shapes.at(index), layout.givers.get(index)
            kind = (_named(layout, index), shape, type(layer), None if giver is None else _named(layout, giver))
            if kind not in kinds:
                if layout.mixer_of(index) is None:
                    measure = functools.partial(_kept_bytes, config, index, shape, dtype)
                    longest = getattr(layer, "sliding_window", 0)
                else:
                    chain = [_mixer(layout, each, shapes.at(each), dtype) for each in (giver, index) if each is not None]
                    measure = functools.partial(_mixer_bytes, chain, shape, dtype)
                    longest = max(_longest(mixer) for mixer in chain)
                kinds[kind] = _extended(measure, max(longest, FILLED) + 1, tokens)
            total += kinds[kind]
    return total


def weight_bytes(model: nn.Module, rows: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
    """The fewest bytes of weights that one decoding step of `rows` sequences reads.

    Weights are counted in `dtype`, except those that are kept in float32. An embedding that is not tied to the head is left
    out, and with few rows so are some experts of a mixture. The model may be on the meta device.
    """
    own: Any = model
    config = own.config.get_text_config(decoder=True)
    embedding, head = own.get_input_embeddings().weight, own.get_output_embeddings()
    wide = set(getattr(model, "float32_names", ()))
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    used = min(1.0, rows * (getattr(config, "num_experts_per_tok", None) or 1) / experts)
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter is embedding and (head is None or head.weight is not embedding):
            continue
        parts = set(name.split("."))
        total += parameter.numel() * (4 if parts & wide else dtype.itemsize) * (used if "experts" in parts else 1.0)
    return int(total)


def limit(weights: int, cache: int, rows: int, bytes_per_second: float) -> float:
    """The most tokens a second at batch size `rows`, if reading the weights and every cache once a step takes all the time.

    Args:
        weights: bytes, from `weight_bytes`. cache: bytes of one sequence, from `state_bytes`.
    """
    return rows * bytes_per_second / (weights + rows * cache)


def _extended(measure, full: int, tokens: int) -> int:
    """`measure(tokens)`, extrapolated linearly beyond `full`."""
    if tokens <= full + STEP:
        return measure(tokens)
    first, second = measure(full), measure(full + STEP)
    return second + (second - first) // STEP * (tokens - full - STEP)


def _kept_bytes(config, index: int, shape: Shape, dtype: torch.dtype, tokens: int) -> int:
    layer = cast(CacheLayerMixin, DynamicCache(config=config.get_text_config(decoder=True)).layers[index])
    keys = torch.empty(1, shape.n_kv_heads, tokens, shape.head_dim, dtype=dtype)
    layer.update(keys, keys)
    return cache_bytes(layer)


def _mixer(layout: Layout, index: int, shape: Shape, dtype: torch.dtype) -> Mixer:
    with real_tensors(), torch.device("meta"):
        mixer = layout.make(index, shape).to(dtype)
    return mixer.to_empty(device="cpu")


def _mixer_bytes(chain: list[Mixer], shape: Shape, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the state of the chain's last mixer; a mixer before it provides the keys and values that it shares."""
    h = torch.empty(1, tokens, shape.d_model, dtype=dtype)
    rope, shared = (torch.empty(1, tokens, shape.head_dim, dtype=dtype),) * 2, SharedKeys() if len(chain) > 1 else None
    for mixer in chain:
        state = MixerState()
        mixer(h, Context(rope=rope, state=state, shared=shared))
    return cache_bytes(state)


def _longest(mixer: Mixer) -> int:
    """The longest window or lag in a mixer."""
    return max(part.horizon for part in mixer.modules() if isinstance(part, Mixer))


def _named(layout: Layout, index: int) -> str:
    """A key for the kind of a layer's cache: its mixer and options, with those given by layer; "" for kept attention."""
    return (
        "" if layout.mixer_of(index) is None else repr(sorted(layout.options_at(index).items(), key=lambda entry: entry[0]))
    )
