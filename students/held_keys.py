"""Kept attention of one token while a `Decoder` holds keys and values in static tensors.

transformers looks up a model's attention function in a table, by the name in the config. A decoder sets the name of `attend`
below while it computes a token. A model whose attention is not in that table, or passes options that `attend` does not
support, keeps its own attention, with a mask over all reserved places.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from students.compat import add_attention, attention_replaced
from students.kernels.attention import attend_places
from students.shapes import Float
from students.static_cache import StaticKeys

NAME = "distill_held"  # in transformers' table
# Options that change nothing for one token after a cache: the ring has the window, and the keys have the positions.
IDLE = frozenset(
    ("sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "document_ids", "unpadded", "shared_keys")
)

_held: ContextVar["Held | None"] = ContextVar("held", default=None)


class Unserved(RuntimeError):
    """An attention that `attend` cannot compute: the model's own implementation is needed."""


class Held:
    """The cache layers with static keys and values, and those of them for which `attend` was called."""

    def __init__(self, layers: Iterable[StaticKeys]) -> None:
        self.layers = {id(layer.keys): layer for layer in layers}
        self.asked: set[int] = set()

    def all_asked(self) -> bool:
        """Whether `attend` was called for every layer."""
        return self.asked == set(self.layers)

    @contextmanager
    def serving(self, config: PretrainedConfig) -> Iterator[None]:
        """Inside the block, models of this config use `attend` for these layers; it also writes the new keys and values."""
        add_attention(NAME, attend)
        token = _held.set(self)
        for layer in self.layers.values():
            layer.defers = True
        try:
            with attention_replaced(config, NAME):
                yield
        finally:
            _held.reset(token)
            for layer in self.layers.values():
                layer.defers, layer.new = False, None


def attend(
    module: nn.Module,
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b kv s d"],
    value: Float[Tensor, "b kv s p"],
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "b t h p"], None]:
    """An attention function for transformers' table. The layer's ring says what the token sees; the mask is not read.

    Raises:
        Unserved: no decoder holds these keys, or an option would change the result.
    """
    held = _held.get()
    layer = None if held is None else held.layers.get(id(key))
    if held is None or layer is None or value is not layer.values:
        raise Unserved(f"{type(module).__name__} attends to keys that no Decoder holds")
    told = sorted(name for name, given in options.items() if name not in IDLE and given is not None and given is not False)
    told = [name for name in told if not (name == "dropout" and options[name] == 0.0)]
    if told or scaling is None:
        raise Unserved(f"{type(module).__name__} calls its attention with {', '.join(told) or 'no scaling'}")
    held.asked.add(id(key))
    ring, new, layer.new = layer.ring, layer.new, None
    y = attend_places(
        *(part.transpose(1, 2) for part in (query, key, value)),
        scale=scaling,
        softcap=softcap,
        last=ring.column,
        window=ring.window,
        start=ring.start,
        mask=ring.mask,
        new=None if new is None else (new[0].transpose(1, 2), new[1].transpose(1, 2)),
    )
    return y, None
