"""Attention projections as plain tensors in one head-major layout, for every packing that a family uses.

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
    """The parameters of one attention layer: head h uses key head h // (heads / key heads).

    a_h = softmax(scale N(q_h x + q_bias_h) . N(k x + k_bias)) (v x + v_bias), output = sum_h o_h a_h + o_bias

    where N is the family's norm of q and k (if it has one), times q_norm or k_norm, followed by the rotary embedding.
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
        """Returns the tensors that this layer has, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


@dataclass(frozen=True)
class LogitRules:
    """The operations of one layer between its projections and its softmax.

    scale: multiplies the logits. softcap: c in c tanh(logits / c). window: how many tokens a token sees, itself included.
    rope: see `Family.rope`. norm: the norm of q and k, see `Family.norm`. norm_eps: its epsilon.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    rope: str | None = "half"
    norm: str | None = None
    norm_eps: float = 1e-6


def unpack(attention: nn.Module, family: Family, heads: int, head_dim: int) -> AttentionWeights:
    """Read the weights of a family's attention module with `heads` query heads of `head_dim` channels."""
    split = PACKINGS[family.packing]
    projections = [getattr(attention, name) for name in family.qkv]
    weights = split([plain(projection.weight) for projection in projections], heads, head_dim)
    tensors: dict[str, Any] = dict(zip("qkv", weights, strict=True))
    rows: list[Tensor | None] = [None, None, None]
    if any(projection.bias is not None for projection in projections):  # packed like the rows of the weights: as one column
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
    """Returns a weight as a plain tensor; a quantised one is dequantised."""
    weight = weight.detach()
    return weight if type(weight) in (Tensor, nn.Parameter) else weight.dequantize()


def _norm_weight(norm: nn.Module, shape: torch.Size) -> Float[Tensor, "kv p"]:
    """Returns the weight of a norm on q or k, one row per head. Some norms have one row for all heads, StableLM one module
    per head."""
    if hasattr(norm, "norms"):
        return _wide(torch.stack([cast(Tensor, one.weight).detach() for one in cast(nn.ModuleList, norm.norms)]))
    weight = _wide(cast(Tensor, norm.weight).detach())  # in bfloat16, adding an offset of 1 would round off digits
    return weight.expand(shape) if weight.numel() == shape[-1] else weight.reshape(shape)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def norm_of(attention: nn.Module, family: Family) -> tuple[str | None, float]:
    """Returns the kind of norm that this layer has on q and k, or None, and its epsilon."""
    norm = getattr(attention, family.norms[0], None)
    if norm is None:
        return None, 1e-6
    norm = norm.norms[0] if hasattr(norm, "norms") else norm
    return family.norm, getattr(norm, "variance_epsilon", None) or norm.eps


def _separate(weights: list[Tensor], heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Split three separate projections."""
    return tuple(weight.unflatten(0, (-1, head_dim)) for weight in weights)


def _stacked(weights: list[Tensor], heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Split one projection with all rows of q, then all of k, then all of v."""
    rows = weights[0].unflatten(0, (-1, head_dim))
    key_heads = (rows.shape[0] - heads) // 2
    return rows.split([heads, key_heads, key_heads])


def _grouped(weights: list[Tensor], heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Split one projection of groups, one per key head: its query heads, then its k, then its v."""
    rows = weights[0].unflatten(0, (-1, head_dim))
    key_heads = (rows.shape[0] - heads) // 2
    groups = rows.unflatten(0, (key_heads, -1))
    return groups[:, :-2].flatten(0, 1), groups[:, -2], groups[:, -1]


def _columns(weights: list[Tensor], heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Split as `_stacked`, for GPT-2's Conv1D, whose weight is the transpose of a linear layer's."""
    return _stacked([weights[0].T], heads, head_dim)


PACKINGS = {"separate": _separate, "stacked": _stacked, "grouped": _grouped, "columns": _columns}


def check_row(model: PreTrainedModel, family: Family, reference: str) -> None:
    """Refuse a row of FAMILIES that names modules which the model's class does not have.

    Raises:
        ValueError: naming the entry of the row and the modules that exist instead.
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
