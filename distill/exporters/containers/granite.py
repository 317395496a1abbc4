"""The GraniteMoeHybrid container: Llama-style blocks with stock Mamba-2 or attention in each layer, dense or with experts.

The blocks are pre-norm with a gated MLP, and the class has Granite's multipliers, so that it holds Llama, Mistral, SmolLM,
Qwen2 and Granite exactly. The shared MLP is fused, gate before up. In a model with experts it is there as well, and is zero.
Experts are chosen by the largest logits and weighted by a softmax over these alone, which equals Mixtral's renormalised
softmax over all experts.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.exporters.containers import granite_engines, kept_attention, stock_mamba2
from distill.exporters.containers.container import Container
from distill.exporters.containers.rewrite import Rewrite

if TYPE_CHECKING:
    from distill.exporters.source import Source

FAMILIES = ("llama", "mistral", "qwen2", "granite", "smollm3", "mixtral")
OTHERS = {  # what the class lacks of other families
    "qwen3": "norms on q and k",
    "qwen3_moe": "norms on q and k",
    "gemma2": "norms after each block, soft caps and GELU",
    "gemma3_text": "norms on q and k and after each block, and GELU",
    "olmo2": "norms on q and k and after each block",
    "phi3": "fused projections",
    **dict.fromkeys(("phi", "gpt_neox", "falcon", "gpt2", "stablelm", "cohere"), "layer norms"),
}
ROPES = ("default", "linear", "llama3", "yarn")  # the others change with the length of the text
IDLE = 256  # channels of the zero MLP in a model with experts: one block of the coarsest quantisation
RENAMED = {
    ".block_sparse_moe.input_linear.weight": ".block_sparse_moe.experts.gate_up_proj",
    ".block_sparse_moe.output_linear.weight": ".block_sparse_moe.experts.down_proj",
    ".block_sparse_moe.router.layer.weight": ".block_sparse_moe.router.weight",
}
GROUPED = "5.23"  # the first version whose gated norm is over each group


class GraniteMoeHybrid(Container):
    """transformers' GraniteMoeHybridForCausalLM."""

    name = "GraniteMoeHybridForCausalLM"
    line = "Llama, Mistral, SmolLM, Qwen2, Granite and Mixtral with stock Mamba-2 and at least one attention layer"

    def reasons(self, source: "Source") -> list[str]:
        if source.family not in FAMILIES:
            what = OTHERS.get(source.family, "blocks")
            return [f"this class lacks the {what} of {source.family}; it holds teachers of {', '.join(FAMILIES)}"]
        return [*_of_teacher(source), *_of_layout(source)]

    def since(self, source: "Source") -> str | None:
        return GROUPED if stock_mamba2.known_sizes(source, stock_mamba2.layers(source)[0]).all_groups > 1 else None

    def engines(self, source: "Source") -> dict[str, str | None]:
        return granite_engines.engines(source, self.since(source))

    def config(self, source: "Source") -> dict:
        config, mamba = source.config, stock_mamba2.layers(source)
        kept = kept_attention.layers(source)
        shape = source.shapes.at(kept[0])
        experts = getattr(config, "num_local_experts", 0)
        rotary = kept_attention.rope_of(source, kept[0]) is not None
        return {
            "model_type": "granitemoehybrid",
            "architectures": [self.name],
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "shared_intermediate_size": IDLE if experts else config.intermediate_size,
            "num_local_experts": experts,
            "num_experts_per_tok": config.num_experts_per_tok if experts else 0,
            "num_hidden_layers": len(source.layout.pattern),
            "layer_types": ["mamba" if n in mamba else "attention" for n in range(len(source.layout.pattern))],
            "num_attention_heads": shape.n_heads,
            "num_key_value_heads": shape.n_kv_heads,
            "head_dim": shape.head_dim,
            "attention_bias": shape.qkv_bias or shape.o_bias,
            "attention_dropout": 0.0,
            "attention_multiplier": shape.logit_scale,
            "embedding_multiplier": getattr(config, "embedding_multiplier", 1.0),
            "residual_multiplier": getattr(config, "residual_multiplier", 1.0),
            "logits_scaling": getattr(config, "logits_scaling", 1.0),
            "position_embedding_type": "rope" if rotary else "nope",
            "rope_parameters": dict(config.rope_parameters),
            "max_position_embeddings": config.max_position_embeddings,
            "hidden_act": "silu",
            "rms_norm_eps": config.rms_norm_eps,
            "initializer_range": config.initializer_range,
            "tie_word_embeddings": config.tie_word_embeddings,
            "use_cache": True,
            **{f"{name}_token_id": getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")},
            **stock_mamba2.entries(stock_mamba2.known_sizes(source, mamba[0]), shape.o_bias),
        }

    def tensors(self, source: "Source", student: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        rewrite, config = Rewrite(student), source.config
        mamba, bias = stock_mamba2.layers(source), self.config(source)["attention_bias"]
        for name in ("model.embed_tokens", "model.norm", *(() if config.tie_word_embeddings else ("lm_head",))):
            rewrite.put(f"{name}.weight", f"{name}.weight")
        for layer in range(len(source.layout.pattern)):
            own, slot = f"{source.place.layers}.{layer}.", source.place.name
            name = f"model.layers.{layer}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                rewrite.put(f"{name}{norm}.weight", f"{own}{norm}.weight")
            if layer in mamba:
                sizes = stock_mamba2.known_sizes(source, layer)
                stock_mamba2.put(rewrite, f"{own}{slot}.mixer.", f"{name}mamba.", sizes, source.shapes.at(layer))
            else:
                kept_attention.put(rewrite, source, layer, f"{name}self_attn.", bias)
            _put_mlp(rewrite, own, name, config)
        return rewrite.finished()

    def name_inside(self, name: str) -> str:
        for ending, inside in RENAMED.items():
            name = name.replace(ending, inside)
        return name

    def float32(self, name: str) -> bool:
        return name.endswith((".A_log", ".D", ".dt_bias"))


def _put_mlp(rewrite: Rewrite, own: str, name: str, config) -> None:
    """Put a layer's MLP. own, name: the prefixes of its tensors in the student and in the container."""
    if not getattr(config, "num_local_experts", 0):
        gate_up = [f"{own}mlp.{part}_proj.weight" for part in ("gate", "up")]
        rewrite.put(f"{name}shared_mlp.input_linear.weight", *gate_up, make=lambda gate, up: torch.cat([gate, up]))
        rewrite.put(f"{name}shared_mlp.output_linear.weight", f"{own}mlp.down_proj.weight")
        return
    hidden = config.hidden_size
    rewrite.put(f"{name}shared_mlp.input_linear.weight", make=lambda: torch.zeros(2 * IDLE, hidden))
    rewrite.put(f"{name}shared_mlp.output_linear.weight", make=lambda: torch.zeros(hidden, IDLE))
    rewrite.put(f"{name}block_sparse_moe.input_linear.weight", f"{own}mlp.experts.gate_up_proj")
    rewrite.put(f"{name}block_sparse_moe.output_linear.weight", f"{own}mlp.experts.down_proj")
    rewrite.put(f"{name}block_sparse_moe.router.layer.weight", f"{own}mlp.gate.weight")


def _of_teacher(source: "Source") -> list[str]:
    """Return what the class cannot hold of the teacher."""
    config, found = source.config, []
    if config.hidden_act not in ("silu", "swish"):
        found.append(f"the teacher's hidden_act is {config.hidden_act}, but the class's MLP and convolution use silu")
    if getattr(config, "mlp_bias", False):
        found.append("the teacher's MLP has biases (mlp_bias), but the class's MLP has none")
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ROPES:
        found.append(
            f"the teacher's rope scaling {kind} changes with the length of the text; this class holds {', '.join(ROPES)}"
        )
    share = config.rope_parameters.get("partial_rotary_factor")
    if share not in (None, 1.0):
        found.append(f"the teacher rotates {share:g} of each head (partial_rotary_factor), but the class all of it")
    if source.shapes.shape.norm_eps != config.rms_norm_eps:
        found.append(
            f"the mixers' norms have epsilon {source.shapes.shape.norm_eps:g}, but all other norms {config.rms_norm_eps:g}"
        )
    if differing := {name for changes in source.shapes.exceptions.values() for name in changes} - {"rope", "window"}:
        found.append(f"the teacher's layers differ in {', '.join(sorted(differing))}, but the class's attention does not")
    return found


def _of_layout(source: "Source") -> list[str]:
    """Return what the class cannot hold of the layout."""
    found, layout = [], source.layout
    others: dict[str, list[str]] = {}
    for letter, options in sorted(layout.mixers.items()):
        if letter in layout.pattern and options["mixer"] not in (stock_mamba2.NAME, *kept_attention.MIXERS):
            others.setdefault(options["mixer"], []).append(f"mixers.{letter}")
    found += [
        f"{', '.join(letters)}: the class has no {mixer}, only mamba2 and attention" for mixer, letters in others.items()
    ]
    if layout.meta_tokens:
        found.append(f"meta_tokens is {layout.meta_tokens}, but the class has none; take them out")
    if not kept_attention.layers(source) and (not others or stock_mamba2.layers(source)):
        found.append("no layer has attention, but the class's cache needs one; keep one (A) in the pattern")
    if not stock_mamba2.layers(source) and not others:
        found.append("no layer has mamba2; give the pattern one")
    return [*found, *kept_attention.reasons(source), *stock_mamba2.reasons(source)]
