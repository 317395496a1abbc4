"""Keys and values of kept attention in memory that is allocated once for a whole prompt.

A cache layer of transformers is copied by every call that adds tokens. A prompt in chunks would copy the cache once a chunk,
and leave fragments of memory that are too small for the next copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from students.shapes import Float


class GrowingKeys(DynamicLayer):
    """A cache layer with memory for a whole prompt, in place of transformers' layer while the prompt is computed in chunks.

    Args:
        layer: the layer that it replaces. tokens: the length of the prompt.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer, tokens: int) -> None:
        super().__init__()
        self.layer, self.tokens = layer, tokens
        self.places: tuple[Tensor, Tensor] | None = None
        if layer.get_seq_length():
            keys, values = cast(Tensor, layer.keys), cast(Tensor, layer.values)
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append a chunk's keys and values, and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        places = self.places
        if places is None or end > places[0].shape[-2]:
            size = max(end, start + self.tokens) if places is None else end
            places = _room(self.keys, key_states, start, size), _room(self.values, value_states, start, size)
            self.places = places
            self.layer.keys = self.layer.values = None  # only after both are copied, because memory may run out
        for place, new in zip(places, (key_states, value_states), strict=True):
            place[..., start:end, :] = new
        self.keys, self.values = (place[..., :end, :] for place in places)
        return self.keys, self.values

    def given_back(self) -> DynamicLayer:
        """The replaced layer, with all keys and values so far."""
        if self.places is not None:
            self.layer.lazy_initialization(self.keys, self.values)
            self.layer.keys, self.layer.values = self.keys, self.values
        return self.layer


@contextmanager
def keys_in_place(cache: Cache, tokens: int) -> Iterator[None]:
    """Inside the block, a cache's attention layers without a window have memory for `tokens` more tokens."""
    held = {index: layer for index, layer in enumerate(cache.layers) if type(layer) is DynamicLayer}
    for index, layer in held.items():
        cache.layers[index] = GrowingKeys(layer, tokens)
    try:
        yield
    finally:
        for index in held:
            cache.layers[index] = cast(GrowingKeys, cache.layers[index]).given_back()


def _room(old: Tensor, new: Float[Tensor, "b h t p"], seen: int, size: int) -> Float[Tensor, "b h size p"]:
    room = new.new_empty(*new.shape[:2], size, new.shape[3])
    if seen:
        room[..., :seen, :] = old
    return room
