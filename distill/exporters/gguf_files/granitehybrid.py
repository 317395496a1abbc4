"""The granitehybrid architecture: GraniteMoeHybrid, dense or with experts.

llama.cpp takes a layer with 0 key heads for Mamba-2, and rotates q and k if `rope.scaling.finetuned` is true.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from distill.exporters.gguf_files import mamba2
from distill.exporters.gguf_files.architecture import (
    Architecture,
    Entry,
    Taken,
    attention,
    head_dim,
    named,
    outer,
    plain_activation,
    rope,
    rope_divisors,
    rope_reason,
    usual,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTION = ("attention", "full_attention")  # the names of such a layer in transformers 4 and 5


class GraniteHybrid(Architecture):
    name = "granitehybrid"

    def reasons(self, config: "PretrainedConfig") -> list[str]:
        found = plain_activation(config) + mamba2.reasons(config) + (rope_reason(config) if _rotates(config) else [])
        if not any(_attends(config)):
            found.append("llama.cpp needs at least one layer of attention")
        try:
            _sizes(config)
        except ValueError as error:
            found.append(str(error))
        return found

    def entries(self, config: "PretrainedConfig") -> dict[str, Entry]:
        found = usual(config) | _sizes(config)[1].entries() | rope(config, head_dim(config))
        found |= {
            "attention.head_count_kv": [config.num_key_value_heads if attends else 0 for attends in _attends(config)],
            "rope.scaling.finetuned": _rotates(config),
            "attention.scale": float(config.attention_multiplier),
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": float(config.logits_scaling),
        }
        if not config.num_local_experts:
            return found | {"feed_forward_length": config.shared_intermediate_size}
        return found | {
            "expert_count": config.num_local_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_shared_feed_forward_length": config.shared_intermediate_size,
        }

    def tensors(self, config: "PretrainedConfig", tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        taken, (own, wanted) = Taken(tensors), _sizes(config)
        yield from outer(taken, config, "model.norm.weight").items()
        if _rotates(config):
            yield from rope_divisors(config, head_dim(config)).items()
        for layer, attends in enumerate(_attends(config)):
            at = f"model.layers.{layer}"
            one = {
                "attn_norm.weight": taken(f"{at}.input_layernorm.weight", config.hidden_size),
                "ffn_norm.weight": taken(f"{at}.post_attention_layernorm.weight", config.hidden_size),
            }
            if attends:
                one |= attention(taken, f"{at}.self_attn", config, interleaved=True)
            else:
                one |= mamba2.mixer(taken, f"{at}.mamba", own, wanted)
            yield from named(layer, one | _feed_forward(taken, at, config))
        taken.finish("lm_head.weight")


def _sizes(config: "PretrainedConfig") -> tuple[mamba2.Mamba2, mamba2.Mamba2]:
    """Return the mixers' own sizes, and those with zeros that llama.cpp needs: an inner width of twice the hidden size.

    Raises:
        ValueError: zeros cannot fill up to that width.
    """
    own = mamba2.Mamba2.of(config)
    return own, own.padded(2 * config.hidden_size)


def _attends(config: "PretrainedConfig") -> list[bool]:
    """Return for each layer whether it is attention."""
    return [kind in ATTENTION for kind in config.layer_types]


def _rotates(config: "PretrainedConfig") -> bool:
    return config.position_embedding_type == "rope"


def _feed_forward(taken: Taken, at: str, config: "PretrainedConfig") -> dict[str, Tensor]:
    """Return the shared feed-forward layer, and the experts if there are any. Gate and up are one matrix in the class."""
    hidden, shared, found = config.hidden_size, config.shared_intermediate_size, {}
    end = "_shexp" if config.num_local_experts else ""
    into, out = f"{at}.shared_mlp.input_linear.weight", f"{at}.shared_mlp.output_linear.weight"
    if shared or into in taken:  # with experts, the class may have one of width 0
        gate, up = taken(into, 2 * shared, hidden).chunk(2)
        found = {"ffn_gate": gate, "ffn_up": up, "ffn_down": taken(out, hidden, shared)}
        found = {f"{name}{end}.weight": tensor for name, tensor in found.items() if tensor.numel()}
    if not end:
        return found
    experts, width = config.num_local_experts, config.intermediate_size
    router, into, out = _experts(taken, f"{at}.block_sparse_moe")
    gate, up = taken(into, experts, 2 * width, hidden).chunk(2, 1)
    return found | {
        "ffn_gate_inp.weight": taken(router, experts, hidden),
        "ffn_gate_exps.weight": gate,
        "ffn_up_exps.weight": up,
        "ffn_down_exps.weight": taken(out, experts, hidden, width),
    }


def _experts(taken: Taken, at: str) -> tuple[str, str, str]:
    """Name the router's, first and last matrices, as they are called in memory or in files."""
    memory = (f"{at}.router.weight", f"{at}.experts.gate_up_proj", f"{at}.experts.down_proj")
    files = (f"{at}.router.layer.weight", f"{at}.input_linear.weight", f"{at}.output_linear.weight")
    return memory if memory[0] in taken else files
