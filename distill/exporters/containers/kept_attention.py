"""A student's attention in a container's attention layers: kept attention, `attention` and `shared_attention`.

The scale of each head goes into the output projection. A block that several layers share is copied into each of them, with
the layer's low-rank delta added (product and sum in float64, rounded once).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.exporters.containers.rewrite import Rewrite

if TYPE_CHECKING:
    from distill.exporters.source import Source

MIXERS = ("attention", "shared_attention")
PROJECTIONS = ("q", "k", "v", "o")


def layers(source: "Source") -> list[int]:
    """Return the layers that have attention and no other branch."""
    mixed = [source.layout.mixer_of(n) for n in range(len(source.layout.pattern))]
    return [n for n, options in enumerate(mixed) if options is None or options["mixer"] in MIXERS]


def rope_of(source: "Source", layer: int) -> str | None:
    """Return the kind of a layer's rotary embedding; None if it has none."""
    options = source.layout.mixer_of(layer) or {}
    return None if options.get("rope") is False else source.shapes.at(layer).rope


def reasons(source: "Source") -> list[str]:
    """Return why attention layers without windows, soft caps and norms on q and k cannot hold the student's attention.

    Each reason names the recipe's key, or what the teacher has.
    """
    found, positions = [], source.config.max_position_embeddings
    for layer in layers(source):
        shape, letter, options = source.shapes.at(layer), source.layout.pattern[layer], source.layout.mixer_of(layer)
        window = (options or {}).get("window") or shape.window
        if window is not None and window < positions:
            whose = f"mixers.{letter}.window" if options and options.get("window") else "the teacher's sliding_window"
            found.append(
                f"{whose} is {window}, of {positions} positions, but the class's attention sees every token; take it out, "
                f"or convert the layers that have it ({letter})"
            )
        if options and options.get("share_kv"):
            found.append(f"mixers.{letter}.share_kv: every layer of the class has its own keys and values; take it out")
        if shape.softcap is not None:
            found.append(f"the class lacks the teacher's soft cap on attention logits ({shape.softcap:g})")
        if shape.qk_norm is not None:
            found.append("the class lacks the teacher's norms on q and k")
    if len({rope_of(source, layer) is None for layer in layers(source)}) > 1:
        without = [str(layer) for layer in layers(source) if rope_of(source, layer) is None]
        found.append(
            f"layers {', '.join(without)} have attention without rotary embedding, and others with it, but in the class all "
            "layers have it or none has: convert the ones or the others"
        )
    return list(dict.fromkeys(found))


def put(rewrite: Rewrite, source: "Source", layer: int, name: str, bias: bool) -> None:
    """Put a layer's tensors. name: their prefix in the container. bias: whether all four projections have one there."""
    shape, mixed = source.shapes.at(layer), source.layout.mixer_of(layer)
    before = f"{source.place.layers}.{layer}.{source.place.name}."
    width = {"q": shape.n_heads, "k": shape.n_kv_heads, "v": shape.n_kv_heads}
    scale = (f"{before}mixer.scale",) if mixed else ()
    before += "mixer." if mixed else ""
    for projection in PROJECTIONS:
        scaled = scale if projection == "o" else ()
        sources = _weights(source, layer, before, projection)
        plain = len(sources) == 1 and not scaled
        rewrite.put(f"{name}{projection}_proj.weight", *sources, *scaled, make=None if plain else _merged)
        has = shape.o_bias if projection == "o" else shape.qkv_bias
        if bias and has:
            rewrite.put(f"{name}{projection}_proj.bias", f"{before}{projection}_proj.bias")
        elif bias:
            size = shape.d_model if projection == "o" else width[projection] * shape.head_dim
            rewrite.put(f"{name}{projection}_proj.bias", make=lambda size=size: torch.zeros(size))


def _weights(source: "Source", layer: int, before: str, projection: str) -> list[str]:
    """Name the student's tensors that make a projection's weight: its own, or the shared one and the layer's delta."""
    mixed = source.layout.mixer_of(layer)
    if not mixed or mixed["mixer"] != "shared_attention":
        return [f"{before}{projection}_proj.weight"]
    owner = next(group[0] for group in source.layout.groups if layer in group)
    shared = f"{source.place.layers}.{owner}.{source.place.name}.mixer.{projection}_proj.shared.weight"
    delta = [f"{before}{projection}_proj.{part}" for part in ("up", "down")]
    return [shared, *(delta if source.layout.options_at(layer).get("rank", 16) else ())]


def _merged(weight: Tensor, *others: Tensor) -> Tensor:
    """Return a projection's weight with its delta (up, down) added and, for an output projection, its heads scaled."""
    whole = weight.double()
    if len(others) >= 2:
        whole = whole + others[0].double() @ others[1].double()
    if len(others) % 2:
        whole = whole * others[-1].double().repeat_interleave(whole.shape[1] // len(others[-1]))
    return whole.to(weight.dtype)
