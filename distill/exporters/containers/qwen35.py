"""Qwen3.5's text model: holds Qwen3 students whose other layers are gated DeltaNet, exactly.

It differs from Qwen3's blocks in three things, each undone in the weights:

  - its attention's output passes a gate, sigmoid(W h): with W = 0 the gate is 1/2, and o_proj is doubled;
  - its norms multiply by 1 + w: 1 is taken from their weights (not from the delta layers', which multiply by w);
  - it rotates a quarter of a head's channels unless config.json says all.

The delta layers have our mixer's parametrisation. MLX and SGLang know where attention is by `full_attention_interval` alone,
and take the text model inside a config of model_type `qwen3_5`; transformers and vLLM load that form too. It is written
where attention stands in every n-th layer: elsewhere MLX would run other layers without a word.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.exporters.containers.container import Container
from distill.exporters.containers.skeletons import (
    Taking,
    attention_reasons,
    block_entries,
    block_reasons,
    head_and_embedding,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.exporters.source import Source

MIXER = "gated_deltanet"
TAPS = 4  # of the convolution, unless a layout's d_conv says otherwise
MLX_ROPES = ("default", "linear", "llama3")  # those that MLX computes as transformers does


class Qwen35(Container):
    """Qwen3 with gated DeltaNet, in any layout with at least one attention layer."""

    name = "Qwen3_5ForCausalLM"
    line = "Qwen3 teachers with gated_deltanet, attention anywhere"

    def reasons(self, source: "Source") -> list[str]:
        if source.family != "qwen3":
            return [
                f"the teacher is a {source.family} model, and this class's attention has a norm on q and k as qwen3 has: "
                "take a Qwen3 teacher"
            ]
        return [
            *_mixer_reasons(source),
            *_bias_reasons(source),
            *attention_reasons(source, source.kept, "rms"),
            *block_reasons(source),
        ]

    def engines(self, source: "Source") -> dict[str, str | None]:
        mlx = None
        if interval(source) is None:
            mlx = (
                "it takes attention in every n-th layer alone, where (i + 1) % n = 0: say so in pattern (MMMA), or "
                "periodic: true"
            )
        elif (kind := source.config.rope_parameters.get("rope_type", "default")) not in MLX_ROPES:
            mlx = f"its rotary embedding of type {kind} is not the same function"
        return {"transformers": None, "vllm": None, "llama.cpp": _gguf_reason(source), "mlx": mlx}

    def config(self, source: "Source") -> dict:
        shape, every = source.shapes.shape, interval(source)
        text = {"model_type": "qwen3_5_text"} | block_entries(source)
        text |= {
            "attention_bias": False,
            "rope_parameters": {**source.config.rope_parameters, "partial_rotary_factor": 1.0},
            "layer_types": [
                "full_attention" if layer in source.kept else "linear_attention"
                for layer in range(source.config.num_hidden_layers)
            ],
            "linear_conv_kernel_dim": _taps(source),
            "linear_key_head_dim": shape.head_dim,
            "linear_value_head_dim": shape.head_dim,
            "linear_num_key_heads": shape.n_heads,
            "linear_num_value_heads": shape.n_heads,
            "mamba_ssm_dtype": "float32",
        }
        classes = {"architectures": [self.name]}
        if every is None:
            return classes | text
        text["full_attention_interval"] = every
        outside = {name: text[name] for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")}
        return {"model_type": "qwen3_5", **classes, **outside, "text_config": text}

    def tensors(self, source: "Source", student: "Mapping[str, Tensor]") -> dict[str, Tensor]:
        take, config = Taking(student), source.config
        found, width = head_and_embedding(source, take), config.hidden_size
        found["model.norm.weight"] = take("model.norm.weight", width) - 1
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                found[prefix + name] = take(prefix + name, width) - 1
            for name in ("gate_proj", "up_proj", "down_proj"):
                shape = (width, config.intermediate_size) if name == "down_proj" else (config.intermediate_size, width)
                found[f"{prefix}mlp.{name}.weight"] = take(f"{prefix}mlp.{name}.weight", *shape)
            inside = _attention(source, take, prefix) if layer in source.kept else _delta(source, take, prefix)
            found.update({prefix + name: tensor for name, tensor in inside.items()})
        take.done()
        return found

    def float32(self, name: str) -> bool:
        return name.endswith((".A_log", ".dt_bias"))


def interval(source: "Source") -> int | None:
    """n, where attention stands in every n-th layer and nowhere else: in those with (i + 1) % n = 0."""
    layers = source.config.num_hidden_layers
    every = source.kept[0] + 1 if source.kept else layers
    return every if source.kept == list(range(every - 1, layers, every)) else None


def _mixer_reasons(source: "Source") -> list[str]:
    found = []
    for letter, options in sorted(source.layout.mixers.items()):
        if options["mixer"] != MIXER:
            found.append(f"mixers.{letter}.mixer is {options['mixer']}; beside attention this class has {MIXER} alone")
        elif "window" in options:
            found.append(f"mixers.{letter}.window stands beside the state; this class has no place for it: leave it out")
    if not source.kept:
        found.append("the pattern keeps no attention; without any, this class cannot generate: keep a layer (A)")
    return found


def _bias_reasons(source: "Source") -> list[str]:
    shape = source.shapes.shape
    names = [name for name, there in (("q, k and v", shape.qkv_bias), ("o", shape.o_bias)) if there]
    return [f"the teacher's attention has biases ({' and '.join(names)}); the delta layers here have none"] if names else []


def _gguf_reason(source: "Source") -> str | None:
    """llama.cpp's qwen35 wants keys and values of one width, which ours are; and rotary tables that GGUF can say."""
    kind = source.config.rope_parameters.get("rope_type", "default")
    return None if kind in ("default", "linear", "yarn", "llama3") else f"it has no rotary embedding of type {kind}"


def _taps(source: "Source") -> int:
    """The most of any layer: the others' first ones are zeros."""
    return max((options.get("d_conv", TAPS) for options in source.layout.mixers.values()), default=TAPS)


def _attention(source: "Source", take: Taking, prefix: str) -> dict[str, Tensor]:
    shape, inside = source.shapes.shape, f"{prefix}self_attn."
    heads, width = shape.n_heads * shape.head_dim, shape.d_model
    q = take(f"{inside}q_proj.weight", heads, width).unflatten(0, (shape.n_heads, shape.head_dim))
    found = {"q_proj.weight": torch.cat([q, torch.zeros_like(q)], 1).flatten(0, 1)}  # of each head: q, then its gate
    for name in ("k_proj", "v_proj"):
        found[f"{name}.weight"] = take(f"{inside}{name}.weight", shape.n_kv_heads * shape.head_dim, width)
    found["o_proj.weight"] = take(f"{inside}o_proj.weight", width, heads) * 2
    for name in ("q_norm", "k_norm"):
        found[f"{name}.weight"] = take(f"{inside}{name}.weight", shape.head_dim) - 1
    return {f"self_attn.{name}": tensor for name, tensor in found.items()}


def _delta(source: "Source", take: Taking, prefix: str) -> dict[str, Tensor]:
    shape, inside, layer = source.shapes.shape, f"{prefix}self_attn.mixer.", int(prefix.split(".")[2])
    heads, width, n = shape.n_heads * shape.head_dim, shape.d_model, shape.n_heads
    sizes = {"in_proj_qkv": (3 * heads, width), "in_proj_z": (heads, width), "in_proj_b": (n, width), "in_proj_a": (n, width)}
    sizes |= {"out_proj": (width, heads), "norm": (shape.head_dim,)}
    found = {f"{name}.weight": take(f"{inside}{name}.weight", *size) for name, size in sizes.items()}
    found |= {name: take(inside + name, n) for name in ("A_log", "dt_bias")}
    taps = source.layout.options_at(layer).get("d_conv", TAPS)
    weight = take(f"{inside}conv1d.weight", 3 * heads, 1, taps)
    found["conv1d.weight"] = F.pad(weight, (_taps(source) - taps, 0))
    return {f"linear_attn.{name}": tensor for name, tensor in found.items()}
