"""The head of a language model: as the fused losses take it, and wide, as everything that judges takes it.

In bfloat16 the logits of one token in twenty-five have no single first place. So the body of a judged model runs in the
precision of its run, and its head and softmax in float32, products included.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from students.kernels.linear_kl import Head
from students.kernels.linear_kl.reference import logits_of
from students.wrapped import accepted, is_plain


def head_of(model: nn.Module) -> Head:
    """A causal language model's head, with what its family does to the logits (Granite, Cohere, Gemma).

    One that something stands around (an adapter, offloading, quantisation, hooks) is given as a function to call.
    """
    layer, config = _layer_of(model), model.config
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    if is_plain(layer):
        return Head(layer.weight, layer.bias, scale, softcap)

    def call(hidden: Tensor) -> Tensor:
        return layer(accepted(layer, hidden))

    return Head(None, None, scale, softcap, call)


def _layer_of(model: nn.Module) -> Any:
    """The layer of a model's head: a linear layer, or what stands around one."""
    return cast(PreTrainedModel, model).get_output_embeddings()


def trimmed(head: Head, vocabulary: int) -> Head:
    """The head of the first entries of a vocabulary alone: behind those that tokenizers know, models have rows that pad."""
    if head.call is not None:
        call = head.call
        return head._replace(call=lambda hidden: call(hidden)[..., :vocabulary])
    weight = cast(Tensor, head.weight)
    if weight.shape[0] == vocabulary:
        return head
    return head._replace(weight=weight[:vocabulary], bias=None if head.bias is None else head.bias[:vocabulary])


def wide_head(model: nn.Module) -> Head:
    """The head in float32, or wider where it is: a copy where it was narrower. One that is called stays as it is, and is
    called with float32 where it takes that."""
    head = head_of(model)
    if head.weight is None:
        return head
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.detach().to(wide)
    return head._replace(weight=head.weight.detach().to(wide), bias=bias)


def wide_logits(hidden: Float[Tensor, "t d"], head: Head) -> Float[Tensor, "t v"]:
    """The logits of some tokens in float32 or wider, whatever precision the body ran in.

    Args:
        head: from `wide_head`.
    """
    with full_products(hidden.device):
        return logits_of(widened(hidden, head), head)


def widened(hidden: Float[Tensor, "t d"], head: Head) -> Float[Tensor, "t d"]:
    """Hidden states in float32, or as wide as the head where that is wider."""
    kind = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(kind if head.weight is None else torch.promote_types(kind, head.weight.dtype))


@contextmanager
def generating_wide(model: nn.Module) -> Iterator[None]:
    """The same for a model that generates while the block runs: its head's products are float32, unless something stands
    around it."""
    layer = _layer_of(model)
    if not is_plain(layer):
        yield
        return

    def wide(head: nn.Linear, inputs: tuple[Tensor, ...], narrow: Tensor) -> Tensor:
        kind = torch.promote_types(narrow.dtype, torch.float32)
        bias = None if getattr(head, "bias", None) is None else head.bias.to(kind)
        with full_products(narrow.device):
            return nn.functional.linear(inputs[0].to(kind), head.weight.to(kind), bias)

    hook = layer.register_forward_hook(wide)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def full_products(device: torch.device) -> Iterator[None]:
    """Float32 products in float32: neither autocast nor TF32 while the block runs."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
