"""The LM head: as the input of the fused losses, and in float32 for every evaluation.

In bfloat16, one token in twenty-five has two equal highest logits. Therefore the body of an evaluated model runs in the
precision of its run, and its head and softmax in float32, including the matrix product.
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
    """A causal language model's head, with the scale and softcap that its family applies to the logits (Granite, Cohere,
    Gemma).

    A head that is wrapped (by an adapter, offloading, quantisation or hooks) is returned as a function to call.
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
    """The layer of a model's head: a linear layer, or a wrapper around one."""
    return cast(PreTrainedModel, model).get_output_embeddings()


def trimmed(head: Head, vocabulary: int) -> Head:
    """The head without the padding rows that a model may have after the last token of its tokenizer's vocabulary."""
    if head.call is not None:
        call = head.call
        return head._replace(call=lambda hidden: call(hidden)[..., :vocabulary])
    weight = cast(Tensor, head.weight)
    if weight.shape[0] == vocabulary:
        return head
    return head._replace(weight=weight[:vocabulary], bias=None if head.bias is None else head.bias[:vocabulary])


def wide_head(model: nn.Module) -> Head:
    """The head in float32 or wider, copied if it was narrower. A wrapped head is not changed; it gets float32 input if it
    accepts that."""
    head = head_of(model)
    if head.weight is None:
        return head
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.detach().to(wide)
    return head._replace(weight=head.weight.detach().to(wide), bias=bias)


def wide_logits(hidden: Float[Tensor, "t d"], head: Head) -> Float[Tensor, "t v"]:
    """The logits of `t` tokens in float32 or wider, whatever the precision of the hidden states.

    Args:
        head: from `wide_head`.
    """
    with full_products(hidden.device):
        return logits_of(widened(hidden, head), head)


def widened(hidden: Float[Tensor, "t d"], head: Head) -> Float[Tensor, "t d"]:
    """The hidden states in float32, or in the head's type if that is wider."""
    kind = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(kind if head.weight is None else torch.promote_types(kind, head.weight.dtype))


@contextmanager
def generating_wide(model: nn.Module) -> Iterator[None]:
    """Inside the block, a model that generates computes its head's product in float32, unless the head is wrapped."""
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
    """Inside the block, float32 products are computed in float32, without autocast and without TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
