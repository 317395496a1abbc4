"""Keys and values of kept attention, in room that is taken once for a whole prompt.

transformers' own layer of a cache is copied with every call that adds to it: a prompt in chunks would move the cache as
often as there are chunks, and leave behind pieces of memory too small for the next copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from students.shapes import Float


class GrowingKeys(DynamicLayer):
    """Stands for a layer of a cache while a prompt comes in chunks.

    Args:
        layer: what it stands for. tokens: how many are to come.
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
        """Write a chunk's behind what there is; all that there is."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        places = self.places
        if places is None or end > places[0].shape[-2]:
            size = max(end, start + self.tokens) if places is None else end
            places = _room(self.keys, key_states, start, size), _room(self.values, value_states, start, size)
            self.places = places
            self.layer.keys = self.layer.values = None  # not before both are copied: memory may run out
        for place, new in zip(places, (key_states, value_states), strict=True):
            place[..., start:end, :] = new
        self.keys, self.values = (place[..., :end, :] for place in places)
        return self.keys, self.values

    def given_back(self) -> DynamicLayer:
        """The layer that stood here, with all that came."""
        if self.places is not None:
            self.layer.lazy_initialization(self.keys, self.values)
            self.layer.keys, self.layer.values = self.keys, self.values
        return self.layer


@contextmanager
def keys_in_place(cache: Cache, tokens: int) -> Iterator[None]:
    """Inside the block, a cache's attention layers that keep everything have room for so many tokens more."""
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
