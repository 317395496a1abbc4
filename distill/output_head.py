"""The head of a language model, as the fused losses take it."""

from torch import Tensor, nn

from students.kernels.linear_kl import Head
from students.wrapped import accepted, is_plain


def head_of(model: nn.Module) -> Head:
    """A causal language model's head, with what its family does to the logits (Granite, Cohere, Gemma).

    One that something stands around (an adapter, offloading, quantisation, hooks) is given as a function to call.
    """
    layer, config = model.get_output_embeddings(), model.config
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    if is_plain(layer):
        return Head(layer.weight, layer.bias, scale, softcap)

    def call(hidden: Tensor) -> Tensor:
        return layer(accepted(layer, hidden))

    return Head(None, None, scale, softcap, call)
