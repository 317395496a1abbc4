"""Fused decoding of one token in the skeleton's layers: products with norms, rotary embedding, SwiGLU and residuals.

A `Decoder` uses it for layers of the families below, inside the model's own loop over layers; mixers in slots are included.
A layer with hooks, adapters, offloading or quantised weights keeps its own `forward`, and so does every layer of another
family.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from students.compat import attention_implementation
from students.kernels.rotary_token import Places, rotary_token
from students.kernels.token_linear import Rows, token_linear
from students.mixers.entering import Entering, Entry, leaving
from students.shapes import Float
from students.slot import MixerSlot
from students.static_cache import StaticKeys
from students.wrapped import is_plain, is_untouched, numbers

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")  # prefixes of class names in transformers
SWISH = ("SiLU", "SiLUActivation")

_decoding: ContextVar[bool] = ContextVar("whether a decoder computes a token in this thread", default=False)


@contextmanager
def fused(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, layers that have a fused form use it for one token, in this thread only."""
    changed, token = [], _decoding.set(True)
    try:
        for layer in _layers(model):
            if _serves(layer):
                layer.forward = _Layer(layer)
                changed.append(layer)
        norm, head = getattr(model.base_model, "norm", None), model.get_output_embeddings()
        if (
            changed
            and norm is not None
            and head is not None
            and _is_norm(norm)
            and is_plain(head)
            and not torch.is_autocast_enabled(head.weight.device.type)
        ):
            head.forward, norm.forward = _Head(head, norm), _Unchanged(norm)
            changed += [norm, head]
        yield
    finally:
        _decoding.reset(token)
        for module in changed:
            module.__dict__.pop("forward", None)  # another thread's block may have ended first


def fused_layers(model: PreTrainedModel) -> int:
    """The number of a model's layers that have a fused form."""
    return sum(map(_serves, _layers(model)))


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    whole = {name + "ForCausalLM" for name in FAMILIES}
    if not any(kind.__name__ in whole and kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        return []
    return list(cast(nn.ModuleList, model.base_model.layers))


def _family(module: nn.Module, part: str) -> bool:
    """Whether a module is of transformers' class for this part, in one of `FAMILIES`."""
    kind = type(module)
    return kind.__module__.startswith("transformers.") and kind.__name__ in [name + part for name in FAMILIES]


def _is_norm(module: nn.Module | None) -> bool:
    return (
        module is not None
        and _family(module, "RMSNorm")
        and is_untouched(module)
        and not cast(Tensor, module.weight).is_meta
    )


def _serves(layer: nn.Module) -> bool:
    """Whether a layer has a fused form: it is of one of `FAMILIES`, and the parts that are not called have no hooks."""
    if not (_family(layer, "DecoderLayer") and is_untouched(layer)):
        return False
    parts = cast(Any, layer)
    mlp, attention = parts.mlp, parts.self_attn
    if not (_is_norm(parts.input_layernorm) and _is_norm(parts.post_attention_layernorm)):
        return False
    if not (_family(mlp, "MLP") and is_untouched(mlp) and is_untouched(mlp.act_fn) and type(mlp.act_fn).__name__ in SWISH):
        return False
    if not is_untouched(attention):
        return False
    if isinstance(attention, MixerSlot):
        return attention.documents == "keywords" and is_untouched(attention.mixer)
    norms = [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    return _family(attention, "Attention") and all(map(_is_norm, norms))


class _Replaced:
    """A module's `forward` while a decoder computes a token; calls from other threads get the module's own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, hidden_states: Float[Tensor, "b t d"], *arguments, **keywords) -> Tensor:
        if not _decoding.get():
            return type(self.module).forward(self.module, hidden_states, *arguments, **keywords)
        return self.token(hidden_states, **keywords)

    def token(self, hidden_states: Float[Tensor, "b 1 d"], **keywords) -> Tensor:
        """The output for a decoder's token."""
        raise NotImplementedError


class _Layer(_Replaced):
    def token(self, hidden_states: Float[Tensor, "b 1 d"], **keywords) -> Float[Tensor, "b 1 d"]:
        layer: Any = self.module
        attention = layer.self_attn
        entering = Entering(hidden_states, _norm(layer.input_layernorm))
        if isinstance(attention, MixerSlot):
            mixed = attention.token(entering, hidden_states, **keywords)
        else:
            mixed = _attend(attention, entering, hidden_states, **keywords)
        return _mlp(layer.mlp, Entering(mixed, _norm(layer.post_attention_layernorm)), mixed)


def _norm(module: nn.Module) -> tuple[Tensor, float]:
    return cast(Tensor, module.weight), cast(float, module.variance_epsilon)


def _mlp(mlp: Any, entering: Entering, residual: Float[Tensor, "b 1 d"]) -> Float[Tensor, "b 1 d"]:
    gate, up = mlp.gate_proj, mlp.up_proj
    if is_plain(gate) and is_plain(up) and not torch.is_autocast_enabled(residual.device.type):
        rows = [Rows(part.weight, part.bias) for part in (gate, up)]
        (opened,) = token_linear(entering.x[:, 0], rows, norm=entering.norm, swiglu=True, dtype=residual.dtype)
        opened = opened[:, None]
    else:
        opened = mlp.act_fn(gate(entering.h)) * up(entering.h)
    return leaving(mlp.down_proj, opened, residual)


def _attend(
    attention: Any,
    entering: Entering,
    residual: Float[Tensor, "b 1 d"],
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **keywords,
) -> Float[Tensor, "b 1 d"]:
    """Kept attention of one token; its key and value are written into the static cache."""
    entries = [Entry(getattr(attention, f"{name}_proj")) for name in "qkv"]
    entering.prime(entries)
    q, k, v = (entering(entry)[:, 0].unflatten(-1, (-1, attention.head_dim)) for entry in entries)
    norms = None
    if hasattr(attention, "q_norm"):
        norms = attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon
    cache = next(value for value in keywords.values() if isinstance(value, Cache))
    held = cast(StaticKeys, cache.layers[attention.layer_idx])
    q = rotary_token(q, k, v, position_embeddings, Places(held.keys, held.values, cast(Tensor, held.ring.place)), norms)
    name = cast(str, attention_implementation(attention.config))
    eager: Any = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    options = {"dropout": 0.0, "scaling": attention.scaling}
    y, _ = interface(attention, q, held.keys, held.values, attention_mask, **options)
    return leaving(attention.o_proj, y.reshape(*residual.shape[:2], -1), residual)


class _Head(_Replaced):
    """The output head, and the norm before it."""

    def __init__(self, module: nn.Module, norm: nn.Module) -> None:
        super().__init__(module)
        self.norm = norm

    def token(self, hidden_states: Float[Tensor, "b 1 d"], **keywords) -> Float[Tensor, "b 1 v"]:
        rows = [Rows(*numbers(self.module))]
        (found,) = token_linear(hidden_states[:, 0], rows, norm=_norm(self.norm), dtype=hidden_states.dtype)
        return found[:, None]


class _Unchanged(_Replaced):
    def token(self, hidden_states: Float[Tensor, "b 1 d"], **keywords) -> Float[Tensor, "b 1 d"]:
        return hidden_states
