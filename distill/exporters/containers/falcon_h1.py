"""The Falcon-H1 container: students with attention and stock Mamba-2 in parallel in every layer ("Hymba-lite").

A Falcon-H1 layer adds the outputs of both branches to the residual stream. A student's layer does the same with
`norm: false`, except that betas scale each branch. Half of each beta goes into the Mamba branch's norm weights or into the
columns of the attention's o_proj. The attention's scale of each head goes into these columns too. Every multiplier of
the class is 1.
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
TAPS, EXPAND = 4, 2  # mamba2's defaults
CHUNK = 256  # of the scan; the result does not depend on it


class FalconH1(Container):
    """Attention and stock Mamba-2 on the same input in every layer, their outputs added."""

    name = "FalconH1ForCausalLM"
    line = "Llama, Mistral and Qwen2 teachers with parallel_heads {norm: false, ssm: {mixer: mamba2}} in every layer"

    def reasons(self, source: "Source") -> list[str]:
        if source.family not in FAMILIES:
            return [f"the teacher is a {source.family} model; this class has the blocks of {', '.join(FAMILIES)}"]
        if others := sorted({options["mixer"] for options in source.layout.mixers.values()} - {MIXER}):
            return [f"the layout has {', '.join(others)}; every layer of this class is {MIXER}"]
        found = []
        if source.kept:
            found.append(
                f"pattern has attention without a mixer in layers {_shown(source.kept)}; every layer of this class has both"
            )
        for letter, options in sorted(source.layout.mixers.items()):
            found += _option_reasons(f"mixers.{letter}", options)
        if not found:
            found += _size_reasons(source)
        layers = range(source.config.num_hidden_layers)
        return [*found, *attention_reasons(source, layers, None), *block_reasons(source)]

    def since(self, source: "Source") -> str | None:
        return "5.23"  # earlier versions mix up the rows of a batch in decoding if the Mamba branch has its norm

    def engines(self, source: "Source") -> dict[str, str | None]:
        groups, inside_mlp = _ssm(source)["n_groups"], getattr(source.config, "mlp_bias", False)
        mlx = f"its norm ignores groups, but this student's Mamba-2 has {groups}; set n_groups: 1 under ssm"
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
        entries |= {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}  # rope_theta is for MLX
        if rope.get("rope_type", "default") != "default":
            entries["rope_scaling"] = rope  # for MLX
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
    """Return why an engine without these biases does not run the student. there: whether it has them, by place."""
    names = [name for name, has in there.items() if has]
    return f"its Falcon-H1 has no biases in the {' and '.join(names)}, but the teacher has" if names else None


def _option_reasons(where: str, options: dict) -> list[str]:
    """Return which of a mixer's options the class cannot hold, and what to set instead."""
    found, ssm = [], options.get("ssm")
    if options.get("norm", True):
        found.append(f"{where}.norm is true; this class adds its branches without norms: set norm: false")
    if options.get("window") is not None:
        found.append(f"{where}.window is {options['window']}; this class's attention sees every token: leave it out")
    if options.get("share_kv"):
        found.append(f"{where}.share_kv is true; every layer of this class has its own keys and values: leave it out")
    if not ssm or ssm.get("mixer") != SSM:
        named = "discrete_mamba2" if not ssm else ssm.get("mixer")
        found.append(f"{where}.ssm is {named}; this class has {SSM}: set ssm: {{mixer: {SSM}}}")
    elif ssm.get("lag"):
        found.append(f"{where}.ssm.lag is {ssm['lag']}; this class's state takes every token without a lag: leave it out")
    return found


def _size_reasons(source: "Source") -> list[str]:
    """Return the sizes of the Mamba branch that differ between letters. Taps may differ."""
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
    """Return the sizes of the Mamba branch, with the most taps of any layer. Fewer taps are padded with zeros in front."""
    sizes = [_sizes(source, options["ssm"]) for options in source.layout.mixers.values()]
    return sizes[0] | {"d_conv": max(one["d_conv"] for one in sizes)}


def _attention_bias(source: "Source") -> bool:
    return source.shapes.shape.qkv_bias or source.shapes.shape.o_bias


def _put_mamba(rewrite: Rewrite, source: "Source", layer: int) -> None:
    """Put the Mamba branch. Half of each beta goes into the norm's weights."""
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
    """Put the attention. The scales of its heads and half of each beta go into the columns of o_proj.

    The class has biases on all four projections or on none, so missing ones are zeros. A bias of the Mamba branch's output
    becomes o_proj's.
    """
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
