"""Stock Mamba-2 (`mamba2`) in transformers' Mamba-2 layers: sizes, refusals, config entries, tensors.

The classes need d_inner = expand x hidden with a whole expand, and kernels need short convolutions of certain widths. What
is missing is filled with zeros, which is exact: added heads have x = 0 and norm groups of their own, and added taps are 0
and stand before the others.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.exporters.containers.rewrite import Rewrite

if TYPE_CHECKING:
    from distill.exporters.source import Source
    from students.mixers.mixer import Shape

NAME = "mamba2"
TAPS = 4  # a width that every engine's convolution has


@dataclass(frozen=True)
class Sizes:
    """The sizes of a mixer, and of its zero-padded form in the container.

    heads, groups, taps: the mixer's own. all_heads, all_groups, all_taps: with the added zeros. head_dim, d_state: channels
    of a head, and of its state.
    """

    heads: int
    groups: int
    taps: int
    head_dim: int
    d_state: int
    expand: int
    all_heads: int
    all_groups: int
    all_taps: int

    @property
    def inner(self) -> int:
        """Channels of the mixer's own heads."""
        return self.heads * self.head_dim


def letters(source: "Source") -> dict[str, dict]:
    """Return the letters of the layout that stand for this mixer, with their options."""
    used = set(source.layout.pattern)
    return {letter: one for letter, one in source.layout.mixers.items() if one["mixer"] == NAME and letter in used}


def layers(source: "Source") -> list[int]:
    """Return the layers that have this mixer."""
    return [
        layer for layer in source.layout.converted if source.layout.mixers[source.layout.pattern[layer]]["mixer"] == NAME
    ]


def known_sizes(source: "Source", layer: int) -> Sizes:
    """Return a layer's sizes, for a student without `reasons`."""
    return cast(Sizes, sizes_of(source, layer))


def sizes_of(source: "Source", layer: int) -> Sizes | None:
    """Return a layer's sizes; None if zero heads cannot fill d_inner up to a multiple of the hidden size."""
    shape, options = source.shapes.at(layer), source.layout.options_at(layer)
    heads, hidden = options.get("expand", 2) * shape.n_heads, shape.d_model
    groups, taps = options.get("n_groups") or shape.n_heads, options.get("d_conv", TAPS)
    inner, group = heads * shape.head_dim, heads * shape.head_dim // groups
    least = -(-inner // hidden)
    expand = next((times for times in range(least, 2 * least + 1) if times * hidden % group == 0), None)
    if expand is None:
        return None
    return Sizes(
        heads,
        groups,
        taps,
        shape.head_dim,
        options.get("d_state") or shape.head_dim,
        expand,
        expand * hidden // shape.head_dim,
        expand * hidden // group,
        max(taps, TAPS),
    )


def reasons(source: "Source") -> list[str]:
    """Return why a container's Mamba-2 layers cannot hold the student's, each reason with the recipe's key."""
    found = []
    for letter, options in letters(source).items():
        if options.get("window"):
            found.append(f"mixers.{letter}.window: the class has no window in a Mamba-2 layer; take it out")
        if options.get("lag"):
            found.append(f"mixers.{letter}.lag is {options['lag']}: the class's Mamba-2 has no lag; take it out")
    wanted = {layer: sizes_of(source, layer) for layer in layers(source)}
    if unfit := [layer for layer, sizes in wanted.items() if sizes is None]:
        shape, letter = source.shapes.at(unfit[0]), source.layout.pattern[unfit[0]]
        found.append(
            f"mixers.{letter}.n_groups: heads of {shape.head_dim} channels in norm groups of this size do not fill a "
            f"multiple of the hidden size {shape.d_model}; leave n_groups out"
        )
    elif len(set(wanted.values())) > 1:
        found.append(f"mixers {' and '.join(letters(source))}: all Mamba-2 layers of the class have the same options")
    return found


def entries(sizes: Sizes, proj_bias: bool) -> dict:
    """Return the entries of config.json, by the names of Bamba's and Granite's classes.

    proj_bias: whether in_proj and out_proj have biases. The upper limit of dt is above any value of softplus; it is finite
    because not every engine reads infinity from JSON.
    """
    return {
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_d_conv": sizes.all_taps,
        "mamba_d_head": sizes.head_dim,
        "mamba_d_state": sizes.d_state,
        "mamba_expand": sizes.expand,
        "mamba_n_groups": sizes.all_groups,
        "mamba_n_heads": sizes.all_heads,
        "mamba_proj_bias": proj_bias,
        "time_step_limit": [0.0, 1e30],
    }


def put(rewrite: Rewrite, before: str, name: str, sizes: Sizes, shape: "Shape") -> None:
    """Put a layer's tensors. before, name: their prefixes in the student and in the container."""
    inner, states = sizes.inner, sizes.groups * sizes.d_state
    more_heads, more_states = sizes.all_heads - sizes.heads, (sizes.all_groups - sizes.groups) * sizes.d_state
    more = more_heads * sizes.head_dim
    channels = ((inner, more), (states, more_states), (states, more_states))

    def rows(*parts: tuple[int, int], front: int = 0):
        return lambda tensor: _filled(tensor, parts, front)

    makes = {
        "in_proj.weight": rows((inner, more), *channels, (sizes.heads, more_heads)),
        "conv1d.weight": rows(*channels, front=sizes.all_taps - sizes.taps),
        "conv1d.bias": rows(*channels),
        **dict.fromkeys(("dt_bias", "A_log", "D"), rows((sizes.heads, more_heads))),
        "norm.weight": lambda tensor: F.pad(tensor, (0, more), value=1.0),
        "out_proj.weight": lambda tensor: F.pad(tensor, (0, more)),
    }
    for part, make in makes.items():
        rewrite.put(name + part, before + part, make=make)
    if shape.o_bias:
        width = 2 * (inner + more) + 2 * (states + more_states) + sizes.all_heads
        rewrite.put(f"{name}in_proj.bias", make=lambda: torch.zeros(width))
        rewrite.put(f"{name}out_proj.bias", f"{before}out_proj.bias")


def _filled(tensor: Tensor, parts: tuple[tuple[int, int], ...], front: int) -> Tensor:
    """Return a tensor with rows of zeros after each part of its rows, and columns of zeros in front.

    Args:
        parts: for each part, its rows and the rows of zeros after it. front: columns of zeros before the last axis's own.
    """
    pieces = []
    for (_, more), piece in zip(parts, tensor.split([count for count, _ in parts]), strict=True):
        pieces += [piece, piece.new_zeros(more, *piece.shape[1:])]
    whole = torch.cat(pieces)
    return F.pad(whole, (front, 0)) if front else whole
