"""What kept attention runs while a `Decoder` holds its keys and values: one query against what is there, wherever it stands.

transformers calls the attention that a model's config names by a table of functions. A decoder names the one below for the
length of a token. Models whose attention is no function of that table, or is told more than this one heeds, are served by
their own, with a mask over everything that is reserved.
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
# What changes nothing for one token behind a cache: windows are the ring's, positions are in the keys.
IDLE = frozenset(
    ("sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "document_ids", "unpadded", "shared_keys")
)

_held: ContextVar["Held | None"] = ContextVar("held", default=None)


class Unserved(RuntimeError):
    """An attention that needs its model's own implementation."""


class Held:
    """The layers of a cache whose keys and values stand in place, and which of them attention has asked for."""

    def __init__(self, layers: Iterable[StaticKeys]) -> None:
        self.layers = {id(layer.keys): layer for layer in layers}
        self.asked: set[int] = set()

    def all_asked(self) -> bool:
        """Whether each layer's attention has come here."""
        return self.asked == set(self.layers)

    @contextmanager
    def serving(self, config: PretrainedConfig) -> Iterator[None]:
        """Inside the block the config's models attend by `attend`, which also writes, to these layers alone."""
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
    """An attention of transformers' table. What a token sees is known from the layer's ring, and not from the mask.

    Raises:
        Unserved: keys that no decoder holds, or an option that would change the result.
    """
    held = _held.get()
    layer = None if held is None else held.layers.get(id(key))
    if held is None or layer is None or value is not layer.values:
        raise Unserved(f"{type(module).__name__} attends to keys that stand in no cache in place")
    told = sorted(name for name, given in options.items() if name not in IDLE and given is not None and given is not False)
    told = [name for name in told if not (name == "dropout" and options[name] == 0.0)]
    if told or scaling is None:
        raise Unserved(f"{type(module).__name__} gives its attention {', '.join(told) or 'no scaling'}")
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
