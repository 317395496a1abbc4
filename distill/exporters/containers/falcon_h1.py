"""Falcon-H1: holds students with attention and stock Mamba-2 side by side in every layer ("Hymba-lite"), exactly.

A layer of it adds the outputs of both branches to the residual stream, as ours does where `norm: false` leaves a branch
nothing but its betas: half of each beta goes into the weights of the Mamba branch's norm and into the columns of the
attention's o_proj, and so does the attention's own scale a head. Every multiplier of the class is 1.
"""

from typing import TYPE_CHECKING

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
            found.append(f"pattern keeps attention alone in layers {_shown(source.kept)}; every layer here has both branches")
        for letter, options in sorted(source.layout.mixers.items()):
            found += _option_reasons(f"mixers.{letter}", options)
        if not found:
            found += _size_reasons(source)
        layers = range(source.config.num_hidden_layers)
        return [*found, *attention_reasons(source, layers, None), *block_reasons(source)]

    def since(self, source: "Source") -> str | None:
        return "5.18"

    def engines(self, source: "Source") -> dict[str, str | None]:
        config, ssm = source.config, _ssm(source)
        kind = config.rope_parameters.get("rope_type", "default")
        biased = [
            name
            for name, there in (("attention", _attention_bias(source)), ("MLP", getattr(config, "mlp_bias", False)))
            if there
        ]
        vllm = gguf = f"its Falcon-H1 has no biases in the {' and '.join(biased)}, which the teacher has" if biased else None
        mlx = None
        if ssm["n_groups"] > 1:
            mlx = (
                f"its norm ignores groups, and this student's Mamba-2 has {ssm['n_groups']}: only n_groups: 1 under ssm is "
                "the same function there"
            )
        elif kind != "default":
            mlx = f"it does not read a rotary embedding of type {kind}"
        return {"transformers": None, "vllm": vllm, "llama.cpp": gguf, "mlx": mlx}

    def config(self, source: "Source") -> dict:
        shape, config, ssm = source.shapes.shape, source.config, _ssm(source)
        heads = ssm["expand"] * shape.n_heads
        entries = {"architectures": [self.name], "model_type": "falcon_h1"} | block_entries(source)
        rope = dict(config.rope_parameters)
        entries |= {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}  # the second is read by MLX alone
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

    def tensors(self, source: "Source", student: "Mapping[str, Tensor]") -> dict[str, Tensor]:
        take, config = Taking(student), source.config
        found, width = head_and_embedding(source, take), config.hidden_size
        found["model.final_layernorm.weight"] = take("model.norm.weight", width)
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            inside = {"input_layernorm.weight": take(f"{prefix}input_layernorm.weight", width)}
            inside["pre_ff_layernorm.weight"] = take(f"{prefix}post_attention_layernorm.weight", width)
            inside |= _mlp(source, take, f"{prefix}mlp.") | _branches(source, take, layer)
            found.update({prefix + name: tensor for name, tensor in inside.items()})
        take.done()
        return found

    def float32(self, name: str) -> bool:
        return name.endswith((".A_log", ".dt_bias", ".D"))


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


def _mlp(source: "Source", take: Taking, prefix: str) -> dict[str, Tensor]:
    width, inner, found = source.config.hidden_size, source.config.intermediate_size, {}
    for name, shape in (("gate_proj", (inner, width)), ("up_proj", (inner, width)), ("down_proj", (width, inner))):
        found[f"feed_forward.{name}.weight"] = take(f"{prefix}{name}.weight", *shape)
        if getattr(source.config, "mlp_bias", False):
            found[f"feed_forward.{name}.bias"] = take(f"{prefix}{name}.bias", shape[0])
    return found


def _branches(source: "Source", take: Taking, layer: int) -> dict[str, Tensor]:
    """Both branches, each with half of its betas inside."""
    shape, prefix = source.shapes.shape, f"model.layers.{layer}.self_attn.mixer."
    sizes = _sizes(source, source.layout.options_at(layer)["ssm"])
    heads = sizes["expand"] * shape.n_heads
    beta = take(f"{prefix}beta", heads + shape.n_heads, shape.head_dim).double() / 2
    mamba = _mamba(source, take, f"{prefix}ssm.", sizes, beta[:heads])
    scale = take(f"{prefix}attention.scale", shape.n_heads).double()
    attention = _attention(source, take, f"{prefix}attention.", (scale[:, None] * beta[heads:]).flatten())
    if shape.o_bias:
        attention["self_attn.o_proj.bias"] = take(f"{prefix}ssm.out_proj.bias", shape.d_model)
    elif shape.qkv_bias:  # the class has biases on all four, or on none
        attention["self_attn.o_proj.bias"] = beta.new_zeros(shape.d_model).float()
    return mamba | attention


def _mamba(source: "Source", take: Taking, prefix: str, sizes: dict[str, int], beta: Tensor) -> dict[str, Tensor]:
    heads, width = len(beta), source.shapes.shape.d_model
    inner, states = beta.numel(), 2 * sizes["n_groups"] * sizes["d_state"]
    found = {
        "in_proj.weight": take(f"{prefix}in_proj.weight", 2 * inner + states + heads, width),
        "conv1d.bias": take(f"{prefix}conv1d.bias", inner + states),
        "out_proj.weight": take(f"{prefix}out_proj.weight", width, inner),
        "norm.weight": (take(f"{prefix}norm.weight", inner) * beta.flatten()).float(),
    }
    weight = take(f"{prefix}conv1d.weight", inner + states, 1, sizes["d_conv"])
    found["conv1d.weight"] = F.pad(weight, (_ssm(source)["d_conv"] - sizes["d_conv"], 0))
    found |= {name: take(prefix + name, heads) for name in ("A_log", "D", "dt_bias")}
    return {f"mamba.{name}": tensor for name, tensor in found.items()}


def _attention(source: "Source", take: Taking, prefix: str, columns: Tensor) -> dict[str, Tensor]:
    """columns: what each column of o_proj is multiplied by."""
    shape, found = source.shapes.shape, {}
    heads, keys, width = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim, shape.d_model
    for name, size in (("q_proj", heads), ("k_proj", keys), ("v_proj", keys)):
        found[f"{name}.weight"] = take(f"{prefix}{name}.weight", size, width)
        if shape.qkv_bias:
            found[f"{name}.bias"] = take(f"{prefix}{name}.bias", size)
    if shape.o_bias and not shape.qkv_bias:
        found |= {f"{name}.bias": columns.new_zeros(size).float() for name, size in (("q_proj", heads), ("k_proj", keys))}
        found["v_proj.bias"] = columns.new_zeros(keys).float()
    found["o_proj.weight"] = (take(f"{prefix}o_proj.weight", width, heads) * columns).float()
    return {f"self_attn.{name}": tensor for name, tensor in found.items()}


def _shown(layers: list[int]) -> str:
    return ", ".join(map(str, layers))
