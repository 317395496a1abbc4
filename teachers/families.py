"""The table of families: how each transformers architecture holds its attention. One row a family.

A row says where the attention modules are, how they pack their projections, and which config entries change the logits.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        layers: path of the list of decoder layers. slot: the attention's name in a layer.
        q, k, v, o: names of the projections in the attention module, each its own nn.Linear.
        attention_scale: config entry that multiplies the attention logits, None for 1 / sqrt(head_dim).
    """

    layers: str = "model.layers"
    slot: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    attention_scale: str | None = None


FAMILIES = {
    "llama": Family(),
}


def family_of(model_type: str, reference: str) -> Family:
    """The row of a model type.

    Raises:
        ValueError: there is no such row.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"{reference} is a {model_type!r} model; this version distils {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
