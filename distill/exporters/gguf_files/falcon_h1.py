"""The falcon-h1 architecture: attention and Mamba-2 in parallel after one norm in every layer.

llama.cpp has none of the class's multipliers, so they are multiplied into the weights.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.exporters.gguf_files import mamba2
from distill.exporters.gguf_files.architecture import (
    SCALINGS,
    Architecture,
    Entry,
    Taken,
    attention,
    gated,
    head_dim,
    named,
    outer,
    plain_activation,
    rope,
    rope_reason,
    usual,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class FalconH1(Architecture):
    name = "falcon-h1"

    def reasons(self, config: "PretrainedConfig") -> list[str]:
        found = plain_activation(config) + mamba2.reasons(config) + rope_reason(config, SCALINGS[:-1])
        if config.mamba_rms_norm and config.mamba_norm_before_gate:
            found.append("llama.cpp norms Mamba-2's output after its gate, not before it (mamba_norm_before_gate)")
        if config.projectors_bias or config.mlp_bias:
            found.append("llama.cpp has no biases of projectors and feed-forward layers here (projectors_bias, mlp_bias)")
        return found

    def entries(self, config: "PretrainedConfig") -> dict[str, Entry]:
        return usual(config) | mamba2.Mamba2.of(config).padded().entries() | rope(config, head_dim(config))

    def tensors(self, config: "PretrainedConfig", tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        taken, hidden, own = Taken(tensors), config.hidden_size, mamba2.Mamba2.of(config)
        found = outer(taken, config, "model.final_layernorm.weight")
        embedding, head = config.embedding_multiplier, config.lm_head_multiplier
        if config.tie_word_embeddings and embedding != head:
            found["output.weight"] = found["token_embd.weight"] * head  # embedding and head are no longer the same
        elif not config.tie_word_embeddings:
            found["output.weight"] = found["output.weight"] * head
        found["token_embd.weight"] = found["token_embd.weight"] * embedding
        yield from found.items()
        for layer in range(config.num_hidden_layers):
            at = f"model.layers.{layer}"
            one = {
                "attn_norm.weight": taken(f"{at}.input_layernorm.weight", hidden),
                "ffn_norm": taken(f"{at}.pre_ff_layernorm.weight", hidden),  # llama.cpp's name has no ending
            }
            one |= attention(taken, f"{at}.self_attn", config, interleaved=False, output_bias=False)
            one |= mamba2.mixer(taken, f"{at}.mamba", own, own.padded())
            one |= gated(taken, f"{at}.feed_forward", hidden, config.intermediate_size)
            yield from named(layer, _multiplied(one, config, own.padded()))
        taken.finish("lm_head.weight")


def _multiplied(one: dict[str, Tensor], config: "PretrainedConfig", sizes: mamba2.Mamba2) -> dict[str, Tensor]:
    """Return a layer's tensors with the multipliers in them."""
    into, key, out = config.attention_in_multiplier, config.key_multiplier, config.attention_out_multiplier
    gate, down = config.mlp_multipliers
    states = sizes.groups * sizes.states
    widths = torch.tensor([sizes.inner, sizes.inner, states, states, sizes.heads])
    rows = torch.tensor(config.ssm_multipliers).repeat_interleave(widths)[:, None] * config.ssm_in_multiplier
    factors = {
        "attn_q.weight": into,
        "attn_k.weight": into * key,
        "attn_k.bias": key,
        "attn_v.weight": into,
        "attn_output.weight": out,
        "ssm_in.weight": rows,
        "ssm_out.weight": config.ssm_out_multiplier,
        "ffn_gate.weight": gate,
        "ffn_down.weight": down,
    }
    return {name: tensor * factors[name] if name in factors else tensor for name, tensor in one.items()}
