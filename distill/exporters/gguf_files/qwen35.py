"""The qwen35 architecture: Qwen3.5's text model, with gated DeltaNet and gated attention in any order.

llama.cpp's norms multiply by w, where transformers' multiply by 1 + w. Value heads that share a key head are adjacent in
transformers; in llama.cpp they are as many heads apart as there are key heads.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.exporters.gguf_files.architecture import (
    SCALINGS,
    Architecture,
    Entry,
    Taken,
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

PAIRS = 32  # pairs of channels that Qwen3.5 divides into three sections, one for each position index of an image token
KEY_EPS = 1e-6  # of the norm of queries and keys in transformers; llama.cpp takes rms_norm_eps


class Qwen35(Architecture):
    name = "qwen35"

    def reasons(self, config: "PretrainedConfig") -> list[str]:
        found = plain_activation(config) + rope_reason(config, SCALINGS[:-1])
        if config.attention_bias:
            found.append("llama.cpp has no bias in the attention of qwen35 (attention_bias)")
        if config.linear_key_head_dim != config.linear_value_head_dim:
            found.append(
                f"llama.cpp needs keys and values of one width, not {config.linear_key_head_dim} and "
                f"{config.linear_value_head_dim}"
            )
        if config.rms_norm_eps != KEY_EPS:
            found.append(
                f"llama.cpp norms keys with rms_norm_eps {config.rms_norm_eps:g}, but transformers with {KEY_EPS:g}"
            )
        if "full_attention" not in config.layer_types:
            found.append("llama.cpp needs at least one layer of attention")
        return found

    def entries(self, config: "PretrainedConfig") -> dict[str, Entry]:
        recurrent = [kind == "linear_attention" for kind in config.layer_types]
        rotated = int(head_dim(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))
        found = usual(config) | rope(config, rotated)
        return found | {
            "rope.dimension_sections": _sections(rotated),
            "ssm.conv_kernel": config.linear_conv_kernel_dim,
            "ssm.state_size": config.linear_key_head_dim,
            "ssm.group_count": config.linear_num_key_heads,
            "ssm.time_step_rank": config.linear_num_value_heads,
            "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
            "attention.recurrent_layers": recurrent,
            "full_attention_interval": _interval(recurrent),
        }

    def tensors(self, config: "PretrainedConfig", tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        taken, hidden = Taken(tensors), config.hidden_size
        yield from outer(taken, config, "model.norm.weight", offset=1.0).items()
        for layer, kind in enumerate(config.layer_types):
            at = f"model.layers.{layer}"
            one = {
                "attn_norm.weight": taken(f"{at}.input_layernorm.weight", hidden) + 1,
                "post_attention_norm.weight": taken(f"{at}.post_attention_layernorm.weight", hidden) + 1,
            }
            mixer = _delta_net(taken, f"{at}.linear_attn", config) if kind == "linear_attention" else None
            one |= _attention(taken, f"{at}.self_attn", config) if mixer is None else mixer
            yield from named(layer, one | gated(taken, f"{at}.mlp", hidden, config.intermediate_size))
        taken.finish("lm_head.weight")


def _sections(rotated: int) -> list[int]:
    """Return the pairs in each section, as even as possible. In text all three position indices are equal."""
    pairs = min(PAIRS, rotated // 2)
    return [(pairs + 2 - section) // 3 for section in range(3)] + [0]


def _interval(recurrent: list[bool]) -> int:
    """Return n if every n-th layer is attention, else 4, for llama.cpp versions that know no other order."""
    for every in range(1, len(recurrent) + 1):
        if all(((layer + 1) % every != 0) == found for layer, found in enumerate(recurrent)):
            return every
    return 4


def _attention(taken: Taken, at: str, config: "PretrainedConfig") -> dict[str, Tensor]:
    """Return an attention layer's tensors. In both formats each head's queries are followed by its gate."""
    heads, keys, width, hidden = config.num_attention_heads, config.num_key_value_heads, head_dim(config), config.hidden_size
    return {
        "attn_q.weight": taken(f"{at}.q_proj.weight", 2 * heads * width, hidden),
        "attn_k.weight": taken(f"{at}.k_proj.weight", keys * width, hidden),
        "attn_v.weight": taken(f"{at}.v_proj.weight", keys * width, hidden),
        "attn_output.weight": taken(f"{at}.o_proj.weight", hidden, heads * width),
        "attn_q_norm.weight": taken(f"{at}.q_norm.weight", width) + 1,
        "attn_k_norm.weight": taken(f"{at}.k_norm.weight", width) + 1,
    }


def _delta_net(taken: Taken, at: str, config: "PretrainedConfig") -> dict[str, Tensor]:
    keys, values, width = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim
    hidden, inner, key_rows = config.hidden_size, values * width, 2 * keys * config.linear_key_head_dim

    def apart(tensor: Tensor, channels: int = width) -> Tensor:
        """Reorder value heads from adjacent for each key head to one round over all key heads after the other."""
        return tensor.unflatten(0, (keys, values // keys, channels)).transpose(0, 1).flatten(0, 2)

    def mixed(tensor: Tensor) -> Tensor:
        """Reorder the values, which follow queries and keys."""
        return torch.cat([tensor[:key_rows], apart(tensor[key_rows:])])

    taps = taken(f"{at}.conv1d.weight", key_rows + inner, 1, config.linear_conv_kernel_dim)
    return {
        "attn_qkv.weight": mixed(taken(f"{at}.in_proj_qkv.weight", key_rows + inner, hidden)),
        "attn_gate.weight": apart(taken(f"{at}.in_proj_z.weight", inner, hidden)),
        "ssm_conv1d.weight": mixed(taps[:, 0]),
        "ssm_dt.bias": apart(taken(f"{at}.dt_bias", values), 1),
        "ssm_a": -apart(taken(f"{at}.A_log", values), 1).exp(),
        "ssm_beta.weight": apart(taken(f"{at}.in_proj_b.weight", values, hidden), 1),
        "ssm_alpha.weight": apart(taken(f"{at}.in_proj_a.weight", values, hidden), 1),
        "ssm_norm.weight": taken(f"{at}.norm.weight", width),
        "ssm_out.weight": apart(taken(f"{at}.out_proj.weight", hidden, inner).T).T,
    }
