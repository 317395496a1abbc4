"""Attention projections as plain tensors in one head-major layout, whatever the family packs them like.

h head    kv key head    p channels of a head    d model width
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from teachers.families import Family


@dataclass(frozen=True)
class AttentionWeights:
    """What one attention layer computes with: head h uses key head h // (heads / key heads).

    a_h = softmax(scale (q_h x + q_bias_h) . (k x + k_bias)) (v x + v_bias), output = sum_h o_h a_h + o_bias
    """

    q: Float[Tensor, "h p d"]
    k: Float[Tensor, "kv p d"]
    v: Float[Tensor, "kv p d"]
    o: Float[Tensor, "h d p"]
    q_bias: Float[Tensor, "h p"] | None
    k_bias: Float[Tensor, "kv p"] | None
    v_bias: Float[Tensor, "kv p"] | None
    o_bias: Float[Tensor, " d"] | None

    def named(self) -> dict[str, Tensor]:
        """The tensors that this layer has, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


def unpack(attention: nn.Module, family: Family, head_dim: int) -> AttentionWeights:
    """Read a family's attention module."""
    tensors = {}
    for name, attribute in (("q", family.q), ("k", family.k), ("v", family.v)):
        projection = getattr(attention, attribute)
        tensors[name] = projection.weight.detach().unflatten(0, (-1, head_dim))
        tensors[f"{name}_bias"] = None if projection.bias is None else projection.bias.detach().unflatten(0, (-1, head_dim))
    output = getattr(attention, family.o)
    tensors["o"] = output.weight.detach().unflatten(1, (-1, head_dim)).transpose(0, 1)
    tensors["o_bias"] = None if output.bias is None else output.bias.detach()
    return AttentionWeights(**tensors)
