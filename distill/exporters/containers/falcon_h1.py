"""Falcon-H1: holds students with attention and stock Mamba-2 side by side in every layer ("Hymba-lite"), exactly.

A layer of it adds the outputs of both branches to the residual stream, as ours does where `norm: false` leaves a branch
nothing but its betas: half of each beta goes into the weights of the Mamba branch's norm and into the columns of the
attention's o_proj, and so does the attention's own scale a head. Every multiplier of the class is 1.
"""

from functools import partial
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
    put_mlp,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.exporters.source import Source

FAMILIES = ("llama", "mistral", "qwen2")
MIXER, SSM = "parallel_heads", "mamba2"
TAPS, EXPAND = 4, 2  # what mamba2 takes where a layout says nothing
CHUNK = 256  # of the scan; no part of the function


class FalconH1(Container):
    """Attention and stock Mamba-2 on one input, added, in every layer."""

    name = "FalconH1ForCausalLM"
    line = "Llama, Mistral and Qwen2 teachers with parallel_heads {norm: false, ssm: {mixer: mamba2}} in every layer"

    def reasons(self, source: "Source") -> list[str]:
        if source.family not in FAMILIES:
            return [f"the teacher is a {source.family} model; this class's blocks are those of {', '.join(FAMILIES)}"]
        if others := sorted({options["mixer"] for options in source.layout.mixers.values()} - {MIXER}):
            return [f"the layout has {', '.join(others)}; every layer of this class is {MIXER}"]
        found = []
        if source.kept:
            found.append(
                f"pattern keeps attention alone in layers {_shown(source.kept)}; every layer here has both branches"
            )
        for letter, options in sorted(source.layout.mixers.items()):
            found += _option_reasons(f"mixers.{letter}", options)
        if not found:
            found += _size_reasons(source)
        layers = range(source.config.num_hidden_layers)
        return [*found, *attention_reasons(source, layers, None), *block_reasons(source)]

    def since(self, source: "Source") -> str | None:
        return "5.23"  # before, decoding a batch of several rows mixes them up where the Mamba branch has its norm

    def engines(self, source: "Source") -> dict[str, str | None]:
        groups, inside_mlp = _ssm(source)["n_groups"], getattr(source.config, "mlp_bias", False)
        mlx = (
            f"its norm ignores groups, and this student's Mamba-2 has {groups}: only n_groups: 1 under ssm is the same "
            "function there"
        )
        return {
            "transformers": None,
            "vllm": _without_biases({"attention": _attention_bias(source), "MLP": inside_mlp}),
            "mlx": mlx if groups > 1 else None,
        }

    def gguf_reasons(self, source: "Source") -> list[str]:
        reason = _without_biases({"output of its attention": source.shapes.shape.o_bias})
        return [reason] if reason else []

    def config(self, source: "Source") -> dict:
        shape, config, ssm = source.shapes.shape, source.config, _ssm(source)
        heads = ssm["expand"] * shape.n_heads
        entries = {"architectures": [self.name], "model_type": "falcon_h1"} | block_entries(source)
        rope = dict(config.rope_parameters)
        entries |= {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}  # the second is MLX's
        if rope.get("rope_type", "default") != "default":
            entries["rope_scaling"] = rope  # likewise
        entries |= {"attention_bias": _attention_bias(source), "mlp_bias": getattr(config, "mlp_bias", False)}
        entries |= {
            "mamba_d_ssm": heads * shape.head_dim,
            "mamba_n_heads": heads,
            "mamba_d_head": shape.head_dim,
            "mamba_n_groups": ssm["n_groups"],
            "mamba_d_state": ssm["d_state"],
            "mamba_d_conv": ssm["d_conv"],
            "mamba_expand": ssm["expand"],
            "mamba_chunk_size": CHUNK,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            "mamba_norm_before_gate": False,
            "mamba_rms_norm": True,
            "mamba_use_mlp": True,
            "projectors_bias": False,
        }
        ones = ("embedding", "lm_head", "key", "attention_in", "attention_out", "ssm_in", "ssm_out")
        entries |= {f"{name}_multiplier": 1.0 for name in ones}
        return entries | {"mlp_multipliers": [1.0] * 2, "ssm_multipliers": [1.0] * 5}

    def tensors(self, source: "Source", student: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        rewrite = Rewrite(student)
        put_ends(rewrite, source, final="model.final_layernorm.weight")
        for layer in range(source.config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            for name, own in (("input_layernorm", "input_layernorm"), ("pre_ff_layernorm", "post_attention_layernorm")):
                rewrite.put(f"{prefix}{name}.weight", f"{prefix}{own}.weight")
            put_mlp(rewrite, source, f"{prefix}mlp.", f"{prefix}feed_forward.")
            _put_mamba(rewrite, source, layer)
            _put_attention(rewrite, source, layer)
        return rewrite.finished()

    def float32(self, name: str) -> bool:
        return name.endswith((".A_log", ".dt_bias", ".D"))


def _without_biases(there: dict[str, bool]) -> str | None:
    """there: where the student has biases that an engine leaves out."""
    names = [name for name, has in there.items() if has]
    return f"its Falcon-H1 has no biases in the {' and '.join(names)}, which the teacher has" if names else None


def _option_reasons(where: str, options: dict) -> list[str]:
    """What of a layer's options the class has no place for."""
    found, ssm = [], options.get("ssm")
    if options.get("norm", True):
        found.append(f"{where}.norm is true; this class adds its branches as they are: norm: false")
    if options.get("window") is not None:
        found.append(f"{where}.window is {options['window']}; this class's attention sees everything: leave it out")
    if options.get("share_kv"):
        found.append(f"{where}.share_kv is true; here every layer has keys and values of its own: leave it out")
    if not ssm or ssm.get("mixer") != SSM:
        named = "discrete_mamba2" if not ssm else ssm.get("mixer")
        found.append(f"{where}.ssm is {named}; this class's is {SSM}: ssm: {{mixer: {SSM}}}")
    elif ssm.get("lag"):
        found.append(f"{where}.ssm.lag is {ssm['lag']}; this class's state takes every token at once: leave it out")
    return found


def _size_reasons(source: "Source") -> list[str]:
    """Sizes of the Mamba branch that differ between letters; taps may."""
    sizes = [_sizes(source, options["ssm"]) for options in source.layout.mixers.values()]
    return [
        f"ssm.{name} differs between the layout's letters; this class has one for all layers"
        for name in ("expand", "n_groups", "d_state")
        if len({one[name] for one in sizes}) > 1
    ]


def _sizes(source: "Source", ssm: dict) -> dict[str, int]:
    shape = source.shapes.shape
    usual = {"expand": EXPAND, "n_groups": shape.n_heads, "d_state": shape.head_dim, "d_conv": TAPS}
    return {name: value if ssm.get(name) is None else ssm[name] for name, value in usual.items()}


def _ssm(source: "Source") -> dict[str, int]:
    """The sizes of the Mamba branch; of taps the most of any layer, the others' first ones are zeros."""
    sizes = [_sizes(source, options["ssm"]) for options in source.layout.mixers.values()]
    return sizes[0] | {"d_conv": max(one["d_conv"] for one in sizes)}


def _attention_bias(source: "Source") -> bool:
    return source.shapes.shape.qkv_bias or source.shapes.shape.o_bias


def _put_mamba(rewrite: Rewrite, source: "Source", layer: int) -> None:
    """The Mamba branch; half of its betas go into its norm's weights."""
    mixer, name = f"model.layers.{layer}.self_attn.mixer.", f"model.layers.{layer}.mamba."
    own, sizes = f"{mixer}ssm.", _sizes(source, source.layout.options_at(layer)["ssm"])
    heads, missing = sizes["expand"] * source.shapes.shape.n_heads, _ssm(source)["d_conv"] - sizes["d_conv"]
    for each in ("in_proj.weight", "conv1d.bias", "A_log", "D", "dt_bias", "out_proj.weight"):
        rewrite.put(name + each, own + each)
    taps = "conv1d.weight"
    rewrite.put(name + taps, own + taps, make=None if not missing else lambda weight: F.pad(weight, (missing, 0)))

    def halved(weight: Tensor, beta: Tensor) -> Tensor:
        return (weight.double() * beta[:heads].flatten().double() / 2).to(weight.dtype)

    rewrite.put(f"{name}norm.weight", f"{own}norm.weight", f"{mixer}beta", make=halved)


def _put_attention(rewrite: Rewrite, source: "Source", layer: int) -> None:
    """The attention; the scales of its heads and half of its betas go into the columns of o_proj, and the bias of the other
    branch's output, where there is one, is this one's here. The class has biases on all four projections, or on none."""
    shape, name = source.shapes.shape, f"model.layers.{layer}.self_attn."
    mixer = f"{name}mixer."
    own, has_biases = f"{mixer}attention.", _attention_bias(source)
    widths = {"q_proj": shape.n_heads * shape.head_dim}
    widths["k_proj"] = widths["v_proj"] = shape.n_kv_heads * shape.head_dim
    for each, width in widths.items():
        rewrite.put(f"{name}{each}.weight", f"{own}{each}.weight")
        if shape.qkv_bias:
            rewrite.put(f"{name}{each}.bias", f"{own}{each}.bias")
        elif has_biases:
            rewrite.put(f"{name}{each}.bias", make=partial(torch.zeros, width))
    if shape.o_bias:
        rewrite.put(f"{name}o_proj.bias", f"{mixer}ssm.out_proj.bias")
    elif has_biases:
        rewrite.put(f"{name}o_proj.bias", make=partial(torch.zeros, shape.d_model))

    def scaled(weight: Tensor, scale: Tensor, beta: Tensor) -> Tensor:
        columns = scale.double()[:, None] * beta[-shape.n_heads :].double() / 2
        return (weight.double() * columns.flatten()).to(weight.dtype)

    rewrite.put(f"{name}o_proj.weight", f"{own}o_proj.weight", f"{own}scale", f"{mixer}beta", make=scaled)


def _shown(layers: list[int]) -> str:
    return ", ".join(map(str, layers))
