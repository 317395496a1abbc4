"""The Qwen3.5 container (its text model): Qwen3 students with gated DeltaNet and kept attention.

The class differs from Qwen3's blocks in three points, which the weights or the config undo:

  - A gate, sigmoid(W h), multiplies the attention's output: with W = 0 the gate is 1/2, and o_proj is doubled.
  - The norms multiply by 1 + w: 1 is subtracted from their weights. The delta layers' norms multiply by w and stay.
  - A quarter of a head's channels is rotated unless config.json says all, as it does here.

The delta layers have our mixer's parametrisation.

config.json has the model_type `qwen3_5_text`, which MLX does not know. So config.json names the file MLX_FILE as its
`model_file`, from which MLX gets the class (with `trust_remote_code`). The file is written only where attention stands in
every n-th layer, because MLX reads `full_attention_interval` alone and would run any other layout wrongly without an error.
MLX knows the model_type `qwen3_5`. With that one, transformers 5.24 would replace the folder's tokenizer by Qwen3.5's own,
which splits words with combining marks differently.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.exporters.containers.container import Container
from distill.exporters.containers.rewrite import Rewrite
from distill.exporters.containers.skeletons import (
    attention_reasons,
    block_entries,
    block_reasons,
    put_ends,
    put_less,
    put_mlp,
)
from distill.exporters.engines import Preparation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.exporters.source import Source

MIXER = "gated_deltanet"
DELTA = (
    *(f"{name}.weight" for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "norm", "out_proj")),
    "A_log",
    "dt_bias",
)
MLX_FILE = "mlx_qwen35.py"
MLX_CODE = '''"""The class of this folder's text model for MLX, which knows it under another name."""

from mlx_lm.models.qwen3_5 import Model, ModelArgs  # noqa: F401
'''
TAPS = 4  # of the convolution, unless a layout's d_conv says otherwise


class Qwen35(Container):
    """Qwen3 with gated DeltaNet, in any layout with at least one attention layer."""

    name = "Qwen3_5ForCausalLM"
    line = "Qwen3 teachers with gated_deltanet, attention anywhere"
    preparations = {
        "vllm": Preparation(
            "vLLM imports torchvision for Qwen3.5, also for text alone", "pip install --no-deps torchvision"
        ),
    }

    def reasons(self, source: "Source") -> list[str]:
        if source.family != "qwen3":
            return [
                f"the teacher is a {source.family} model, but this class's attention has norms on q and k as Qwen3 has: "
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
                "it takes attention only in every n-th layer, where (i + 1) % n = 0: write such a pattern (MMMA), or set "
                "periodic: true"
            )
        return {"transformers": None, "vllm": None, "mlx": mlx}

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
        mlx = {} if every is None else {"full_attention_interval": every, "model_file": MLX_FILE}
        return {"architectures": [self.name]} | text | mlx

    def files(self, source: "Source") -> dict[str, str]:
        return {} if interval(source) is None else {MLX_FILE: MLX_CODE}

    def tensors(self, source: "Source", student: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        rewrite = Rewrite(student)
        put_ends(rewrite, source, offset=1.0)
        for layer in range(source.config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                put_less(rewrite, prefix + name, prefix + name, 1.0)
            put_mlp(rewrite, source, f"{prefix}mlp.", f"{prefix}mlp.")
            if layer in source.kept:
                _put_attention(rewrite, f"{prefix}self_attn.", source.shapes.shape.n_heads)
            else:
                missing = _taps(source) - source.layout.options_at(layer).get("d_conv", TAPS)
                _put_delta(rewrite, f"{prefix}self_attn.mixer.", f"{prefix}linear_attn.", missing)
        return rewrite.finished()

    def float32(self, name: str) -> bool:
        return name.endswith((".A_log", ".dt_bias"))


def interval(source: "Source") -> int | None:
    """Return n if the layers i with (i + 1) % n = 0 have attention and no others do; else None."""
    layers = source.config.num_hidden_layers
    every = source.kept[0] + 1 if source.kept else layers
    return every if source.kept == list(range(every - 1, layers, every)) else None


def _mixer_reasons(source: "Source") -> list[str]:
    found = []
    for letter, options in sorted(source.layout.mixers.items()):
        if options["mixer"] != MIXER:
            found.append(f"mixers.{letter}.mixer is {options['mixer']}; this class has only {MIXER} and attention")
        elif "window" in options:
            found.append(f"mixers.{letter}.window: this class has no window in a layer with a state; leave it out")
    if not source.kept:
        found.append("the pattern keeps no attention, but this class cannot generate without any: keep a layer (A)")
    return found


def _bias_reasons(source: "Source") -> list[str]:
    shape = source.shapes.shape
    names = [name for name, there in (("q, k and v", shape.qkv_bias), ("o", shape.o_bias)) if there]
    return (
        [f"the teacher's attention has biases ({' and '.join(names)}); the class's delta layers have none"] if names else []
    )


def _taps(source: "Source") -> int:
    """Return the most taps of any layer. Fewer taps are padded with zeros in front."""
    return max((options.get("d_conv", TAPS) for options in source.layout.mixers.values()), default=TAPS)


def _put_attention(rewrite: Rewrite, prefix: str, heads: int) -> None:
    def with_gates(weight: Tensor) -> Tensor:
        q = weight.unflatten(0, (heads, -1))
        return torch.cat([q, torch.zeros_like(q)], 1).flatten(0, 1)  # for each head: q, then its gate

    rewrite.put(f"{prefix}q_proj.weight", f"{prefix}q_proj.weight", make=with_gates)
    for name in ("k_proj", "v_proj"):
        rewrite.put(f"{prefix}{name}.weight", f"{prefix}{name}.weight")
    rewrite.put(f"{prefix}o_proj.weight", f"{prefix}o_proj.weight", make=lambda weight: weight * 2)
    for name in ("q_norm", "k_norm"):
        put_less(rewrite, f"{prefix}{name}.weight", f"{prefix}{name}.weight", 1.0)


def _put_delta(rewrite: Rewrite, own: str, name: str, missing: int) -> None:
    """Put a delta layer. missing: how many taps of zero the class has before the layer's own."""
    for each in DELTA:
        rewrite.put(name + each, own + each)
    taps = "conv1d.weight"
    rewrite.put(name + taps, own + taps, make=None if not missing else lambda weight: F.pad(weight, (missing, 0)))
