"""Checks of layers that share keys and values (Hymba, arXiv 2411.13676, section 2.2), when a student is built."""

from students.config import Place, Shapes
from students.mixers.attention import Attention
from students.mixers.mixer import Mixer

SAME = ("n_kv_heads", "head_dim", "rope", "qk_norm")  # fields of `Shape` on which keys depend


def check_shared_keys(mixers: dict[int, Mixer], givers: dict[int, int], shapes: Shapes, place: Place) -> None:
    """Refuse layers whose keys and values differ from those of the layer they share with, or which that layer drops sooner.

    Args:
        givers: for each layer that shares, the layer whose keys and values it reads.

    Raises:
        ValueError: naming the layers and what differs.
    """
    if givers and place.documents != "keywords":
        raise ValueError("share_kv cannot be used: this family's layers pass nothing to their attention but positions")
    for layer, giver in givers.items():
        own, theirs = shapes.at(layer), shapes.at(giver)
        for name in SAME:
            if getattr(own, name) != getattr(theirs, name):
                raise ValueError(
                    f"layer {layer} cannot share the keys of layer {giver}: its {name} is {getattr(own, name)!r}, and that "
                    f"of layer {giver} is {getattr(theirs, name)!r}"
                )
        taker, kept = _attention(mixers[layer]), _attention(mixers[giver])
        if kept is None or kept.reads is not None:
            raise ValueError(
                f"layer {layer} cannot share the keys of layer {giver}: that layer's attention has only some of the heads"
            )
        assert taker is not None, "a layer that shares keys has an attention that reads them"
        wider = kept.window is not None and (taker.window is None or taker.window > kept.window)
        if wider or (kept.window is not None and taker.sinks > kept.sinks):
            raise ValueError(
                f"layer {layer} (window {taker.window}, sinks {taker.sinks}) cannot share the keys of layer {giver}, which "
                f"keeps fewer (window {kept.window}, sinks {kept.sinks})"
            )


def _attention(mixer: Mixer) -> Attention | None:
    return next((module for module in mixer.modules() if isinstance(module, Attention)), None)
