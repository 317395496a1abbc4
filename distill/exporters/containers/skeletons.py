"""The checks, config entries and tensors that all containers of Llama-like blocks share."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from distill.exporters.containers.rewrite import Rewrite

if TYPE_CHECKING:
    from distill.exporters.source import Source

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
REST = ("rms_norm_eps", "tie_word_embeddings", "initializer_range", "attention_dropout", "use_cache")
ROPES = ("default", "linear", "llama3", "yarn")  # types whose angles do not depend on the length of the text
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def block_entries(source: "Source") -> dict[str, Any]:
    """Return the config entries that mean the same in every class of Llama-like blocks, without the rotary ones."""
    config, shape = source.config, source.shapes.shape
    entries = {name: getattr(config, name) for name in (*SIZES, *REST)}
    entries |= {name: getattr(config, name, None) for name in TOKENS}
    return entries | {
        "hidden_act": "silu",
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
    }


def attention_reasons(source: "Source", layers: Iterable[int], norm: str | None) -> list[str]:
    """Return what full attention with rotary positions cannot hold of the teacher's attention.

    Args:
        layers: the layers whose attention the student runs. norm: the norm on q and k that the class has.
    """
    layers, rule, found = sorted(layers), asdict(source.shapes.shape), []
    changes = {name for layer in layers for name in source.shapes.exceptions.get(layer, {})}
    if varying := sorted(changes - {"window", "rope"}):
        found.append(f"the teacher's attention is not the same in every layer ({', '.join(varying)})")
    shapes = {layer: source.shapes.at(layer) for layer in layers}
    if unrotated := [layer for layer, shape in shapes.items() if shape.rope is None]:
        found.append(f"the teacher's attention has no rotary embedding in {_layers(unrotated)}")
    if any(shape.rope == "pairs" for shape in shapes.values()):
        found.append("the teacher's rotary embedding pairs neighbouring channels, not the two halves of a head")
    positions = source.config.max_position_embeddings
    seen = {layer: shape.window or positions for layer, shape in shapes.items()}
    windows = {layer: window for layer, window in seen.items() if window < positions}
    if windows:
        found.append(
            f"the teacher's attention sees {min(windows.values()):,} of its {positions:,} positions in {_layers(windows)} "
            "(sliding_window); convert those layers, or train with a teacher whose window is off"
        )
    if rule["softcap"] is not None:
        found.append(f"the teacher caps its attention logits at {rule['softcap']:g}")
    if rule["qk_norm"] != norm:
        found.append(f"the teacher's norm on q and k is {rule['qk_norm'] or 'missing'}, the class's {norm or 'missing'}")
    elif norm is not None and rule["qk_norm_eps"] != source.config.rms_norm_eps:
        found.append("the teacher's norms on q and k have an epsilon of their own")
    if rule["softmax_scale"] is not None and not math.isclose(rule["softmax_scale"], rule["head_dim"] ** -0.5):
        found.append(f"the teacher's attention logits are scaled by {rule['softmax_scale']:g}, not 1 / sqrt(head_dim)")
    return found


def block_reasons(source: "Source") -> list[str]:
    """Return what a class of Llama-like blocks cannot hold outside the attention: the teacher's blocks, and meta tokens."""
    config, found = source.config, []
    if config.hidden_act not in ("silu", "swish"):
        found.append(f"the teacher's activation is {config.hidden_act}; the class has silu, in its convolutions too")
    if source.shapes.shape.norm_eps != config.rms_norm_eps:
        found.append("the student's norms have another epsilon than the teacher's")
    if source.layout.meta_tokens:
        found.append(f"meta_tokens is {source.layout.meta_tokens}; the class has none: leave it out")
    rope = config.rope_parameters
    if (share := rope.get("partial_rotary_factor")) not in (None, 1.0):
        found.append(f"the teacher rotates {share:g} of a head's channels (partial_rotary_factor), not all")
    if (kind := rope.get("rope_type", "default")) not in ROPES:
        found.append(f"the teacher's rotary embedding is of type {kind}, which changes with the length of a text")
    return found


def put_ends(rewrite: Rewrite, source: "Source", *, offset: float = 0.0, final: str = "model.norm.weight") -> None:
    """Put the embedding, the output head if it is not tied, and the last norm under the name `final`.

    Args:
        offset: what the class itself adds to the weights of norms.
    """
    for name in ("model.embed_tokens", *(() if source.config.tie_word_embeddings else ("lm_head",))):
        rewrite.put(f"{name}.weight", f"{name}.weight")
    put_less(rewrite, final, "model.norm.weight", offset)


def put_less(rewrite: Rewrite, name: str, own: str, offset: float) -> None:
    """Put a norm's weight, less what the class itself adds to it."""
    rewrite.put(name, own, make=None if not offset else lambda weight: weight - offset)


def put_mlp(rewrite: Rewrite, source: "Source", own: str, name: str) -> None:
    """Put a gated MLP with the biases that it has. own, name: its tensors' prefixes in the student and in the container."""
    kinds = ("weight", "bias") if getattr(source.config, "mlp_bias", False) else ("weight",)
    for part in ("gate_proj", "up_proj", "down_proj"):
        for kind in kinds:
            rewrite.put(f"{name}{part}.{kind}", f"{own}{part}.{kind}")


def _layers(layers: Iterable[int]) -> str:
    layers = list(layers)
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
