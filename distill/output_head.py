"""The head of a language model, as the fused losses take it."""

from torch import nn

from students.kernels.linear_kl import Head


def head_of(model: nn.Module) -> Head:
    """A causal language model's head, with what its family does to the logits (Granite, Cohere, Gemma)."""
    embeddings, config = model.get_output_embeddings(), model.config
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(embeddings.weight, getattr(embeddings, "bias", None), scale, softcap)
