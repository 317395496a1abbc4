"""Attention projections as plain tensors in one head-major layout, whatever the family packs them like.

h head    kv key head    p channels of a head    d model width
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from teachers.families import Family


@dataclass(frozen=True)
class AttentionWeights:
    """What one attention layer computes with: head h uses key head h // (heads / key heads).

    a_h = softmax(scale N(q_h x + q_bias_h) . N(k x + k_bias)) (v x + v_bias), output = sum_h o_h a_h + o_bias

    where N is the family's norm of q and k, times q_norm or k_norm, in families that have one, and then rotary embedding.
    """

    q: Float[Tensor, "h p d"]
    k: Float[Tensor, "kv p d"]
    v: Float[Tensor, "kv p d"]
    o: Float[Tensor, "h d p"]
    q_bias: Float[Tensor, "h p"] | None
    k_bias: Float[Tensor, "kv p"] | None
    v_bias: Float[Tensor, "kv p"] | None
    o_bias: Float[Tensor, " d"] | None
    q_norm: Float[Tensor, "h p"] | None = None
    k_norm: Float[Tensor, "kv p"] | None = None

    def named(self) -> dict[str, Tensor]:
        """The tensors that this layer has, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


@dataclass(frozen=True)
class LogitRules:
    """What one layer does between its projections and its softmax.

    scale: multiplies the logits. softcap: c in c tanh(logits / c). window: tokens a token sees, itself included.
    rope: see `Family.rope`. norm: the norm of q and k, see `Family.norm`, with its epsilon.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    rope: str | None = "half"
    norm: str | None = None
    norm_eps: float = 1e-6


def unpack(attention: nn.Module, family: Family, heads: int, head_dim: int) -> AttentionWeights:
    """Read a family's attention module of so many query heads."""
    split = PACKINGS[family.packing]
    projections = [getattr(attention, name) for name in family.qkv]
    weights = split([plain(projection.weight) for projection in projections], heads, head_dim)
    tensors: dict[str, Any] = dict(zip("qkv", weights, strict=True))
    rows: list[Tensor | None] = [None, None, None]
    if any(projection.bias is not None for projection in projections):  # packed as the rows are: one more column of them
        axis = 0 if family.packing == "columns" else 1
        columns = [projection.bias.detach().unsqueeze(axis) for projection in projections]
        rows = [part[..., 0] for part in split(columns, heads, head_dim)]
    tensors |= dict(zip(("q_bias", "k_bias", "v_bias"), rows, strict=True))
    output = getattr(attention, family.output)
    weight = plain(output.weight)
    weight = weight.T if family.packing == "columns" else weight
    tensors["o"] = weight.unflatten(1, (-1, head_dim)).transpose(0, 1)
    tensors["o_bias"] = None if output.bias is None else output.bias.detach()
    for name, attribute in zip("qk", family.norms, strict=True):
        norm = getattr(attention, attribute, None)
        tensors[f"{name}_norm"] = None if norm is None else _norm_weight(norm, tensors[name].shape[:2]) + family.norm_offset
    return AttentionWeights(**tensors)


def plain(weight: Tensor) -> Tensor:
    """A weight's numbers: those that a quantised one stands for."""
    weight = weight.detach()
    return weight if type(weight) in (Tensor, nn.Parameter) else weight.dequantize()


def _norm_weight(norm: nn.Module, shape: torch.Size) -> Float[Tensor, "kv p"]:
    """The weight of a norm on q or k, a row a head: some have one row for all heads, StableLM one module a head."""
    if hasattr(norm, "norms"):
        return _wide(torch.stack([cast(Tensor, one.weight).detach() for one in cast(nn.ModuleList, norm.norms)]))
    weight = _wide(cast(Tensor, norm.weight).detach())  # an offset of 1 would take their last digits in bfloat16
    return weight.expand(shape) if weight.numel() == shape[-1] else weight.reshape(shape)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def norm_of(attention: nn.Module, family: Family) -> tuple[str | None, float]:
    """The kind of norm that this layer has on q and k, and its epsilon."""
    norm = getattr(attention, family.norms[0], None)
    if norm is None:
        return None, 1e-6
    norm = norm.norms[0] if hasattr(norm, "norms") else norm
    return family.norm, getattr(norm, "variance_epsilon", None) or norm.eps


def _separate(weights: list[Tensor], heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Three projections of their own."""
    return tuple(weight.unflatten(0, (-1, head_dim)) for weight in weights)


def _stacked(weights: list[Tensor], heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """One projection: all rows of q, then all of k, then all of v."""
    rows = weights[0].unflatten(0, (-1, head_dim))
    key_heads = (rows.shape[0] - heads) // 2
    return rows.split([heads, key_heads, key_heads])


def _grouped(weights: list[Tensor], heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """One projection, key head by key head: the query heads that share it, then its k, then its v."""
    rows = weights[0].unflatten(0, (-1, head_dim))
    key_heads = (rows.shape[0] - heads) // 2
    groups = rows.unflatten(0, (key_heads, -1))
    return groups[:, :-2].flatten(0, 1), groups[:, -2], groups[:, -1]


def _columns(weights: list[Tensor], heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Like stacked, in a Conv1D, whose weight is a linear layer's transposed."""
    return _stacked([weights[0].T], heads, head_dim)


PACKINGS = {"separate": _separate, "stacked": _stacked, "grouped": _grouped, "columns": _columns}


def check_row(model: PreTrainedModel, family: Family, reference: str) -> None:
    """Refuse a row that names modules which the family's class does not have.

    Raises:
        ValueError: naming the entry of the row, and what is there instead.
    """
    kind = type(model).__name__
    where = f"{reference}: the row of {model.config.model_type!r} in teachers/families.py"
    layers: nn.Module | None = model
    for part in family.layers.split("."):
        layers = getattr(layers, part, None)
    if not isinstance(layers, nn.ModuleList):
        lists = ", ".join(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)) or "none"
        raise ValueError(
            f"{where} says layers = {family.layers!r}, but {kind} has no such list of layers; its lists: {lists}"
        )
    for index, layer in enumerate(layers):
        slot = getattr(layer, family.slot, None)
        if not isinstance(slot, nn.Module):
            raise ValueError(f"{where} says slot = {family.slot!r}, but layer {index} has {_children(layer)}")
        for entry, names in (("qkv", family.qkv), ("output", (family.output,))):
            for name in names:
                if not isinstance(getattr(slot, name, None), nn.Module):
                    raise ValueError(
                        f"{where} says {entry} = {name!r}, but the attention of layer {index} has {_children(slot)}"
                    )

    if family.packing not in PACKINGS:
        raise ValueError(f"{where} says packing = {family.packing!r}; it is one of {', '.join(PACKINGS)}")


def _children(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "no modules"
