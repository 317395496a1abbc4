"""What containers of Llama-like blocks ask of a student alike, and what they take over alike."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from distill.exporters.source import Source

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
REST = ("hidden_act", "rms_norm_eps", "tie_word_embeddings", "initializer_range", "attention_dropout", "use_cache")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def block_entries(source: "Source") -> dict[str, Any]:
    """The entries of a config that mean the same in every class of Llama-like blocks; the rotary ones are not among them."""
    config, shape = source.config, source.shapes.shape
    entries = {name: getattr(config, name) for name in (*SIZES, *REST)}
    entries |= {name: getattr(config, name, None) for name in TOKENS}
    return entries | {
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
    }


def attention_reasons(source: "Source", layers: Iterable[int], norm: str | None) -> list[str]:
    """What of the teacher's attention a full attention with rotary positions has no place for.

    Args:
        layers: those whose attention a student runs. norm: the norm on q and k that the class has.
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
    windows = {layer: shape.window for layer, shape in shapes.items() if (shape.window or positions) < positions}
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
    """What of the rest of the teacher's blocks has no place in such a class, and meta tokens."""
    config, found = source.config, []
    if config.hidden_act != "silu":
        found.append(f"the teacher's activation is {config.hidden_act}; the class uses it in its convolutions too: silu alone")
    if source.shapes.shape.norm_eps != config.rms_norm_eps:
        found.append("the student's norms have another epsilon than the teacher's")
    if source.layout.meta_tokens:
        found.append(f"meta_tokens is {source.layout.meta_tokens}; the class starts from nothing but text: leave it out")
    if (rope := config.rope_parameters).get("partial_rotary_factor", 1.0) != 1.0:
        found.append(f"the teacher rotates {rope['partial_rotary_factor']:g} of a head's channels, not all")
    return found


class Taking:
    """A student's tensors by name, each taken once and held against the shape that its config says.

    Raises:
        ValueError: by `[...]`, one is missing or has another shape; by `done`, one was left.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._left = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def __call__(self, name: str, *shape: int) -> Tensor:
        if name not in self._left:
            raise ValueError(f"the student has no tensor {name}")
        found = self._left.pop(name)
        if tuple(found.shape) != shape:
            raise ValueError(f"{name} has the shape {list(found.shape)}; its config.json says {list(shape)}")
        return found

    def done(self) -> None:
        """Refuse what no container's tensor was made from."""
        if self._left:
            raise ValueError(f"the student has tensors that its config.json says nothing of: {', '.join(sorted(self._left))}")


def head_and_embedding(source: "Source", take: Taking) -> dict[str, Tensor]:
    """The embedding, and the output head where it is not the same."""
    config, name = source.config, "model.embed_tokens.weight"
    found = {name: take(name, config.vocab_size, config.hidden_size)}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = take("lm_head.weight", config.vocab_size, config.hidden_size)
    elif "lm_head.weight" in take:  # tied, and saved twice
        take("lm_head.weight", config.vocab_size, config.hidden_size)
    return found


def _layers(layers: Iterable[int]) -> str:
    layers = list(layers)
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
