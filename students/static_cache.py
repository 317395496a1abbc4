"""What a cache holds, in places that stay where they are: for decoding one token after another without new memory."""

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from students.cache import MixerState
from students.compat import set_seen_tokens
from students.mixers.attention import Attention
from students.mixers.mixer import Mixer
from students.shapes import Bool, Float, Int

HELD = "a Decoder holds this cache; release() gives it back"
EVEN = 8  # columns that attention kernels take without padding their mask first are a multiple of it


class GraphError(RuntimeError):
    """One token of a model cannot be decoded in place, or not as a CUDA graph."""


class Ring:
    """The columns that layers of one window keep: column c of a text stands at place c % size, over one that is no longer
    seen. `start` [b] is the first column that a row sees where padding is on the left; elsewhere `mask` [b size] are the
    places that it sees.

    Args:
        window: columns that a token sees, its own included (None: all). seen: columns so far. tokens: those to come.
        real: which columns are tokens and no padding; None where all are.
    """

    def __init__(
        self, window: int | None, seen: int, tokens: int, real: Bool[Tensor, "b s"] | None, device: torch.device
    ) -> None:
        self.window, self.seen, self.real = window, seen, real
        self.size = -(-(seen + tokens) // EVEN) * EVEN
        self.size = self.size if window is None else min(window, self.size)
        self.column: Int[Tensor, " 1"] | None = None  # of the token under way
        self.place: Int[Tensor, " 1"] | None = None
        self.start: Int[Tensor, " b"] | None = None
        self.mask: Bool[Tensor, "b size"] | None = None
        self.inner = real is not None and not _is_left(real)
        if self.inner and self.size >= real.shape[1]:  # every column at its own place
            self.mask = nn.functional.pad(real, (0, self.size - real.shape[1]), value=True)
        elif real is not None and not self.inner:
            self.start = real.long().argmax(1)

    def turn(self, column: Int[Tensor, " 1"]) -> None:
        """Go to a column: `place`, where it stands."""
        self.column, self.place = column, column % self.size
        if self.inner and self.size < self.real.shape[1]:
            self.mask = self.visible()

    def visible(self) -> Bool[Tensor, "rows size"]:
        """The places that the token under way sees: for attention that takes a mask."""
        places = torch.arange(self.size, device=self.column.device)
        held = self.column - (self.column - places) % self.size  # the column that stands at each place
        visible = (held >= 0)[None]
        return visible if self.real is None else visible & self.real[:, held.clamp(min=0)]

    def close(self) -> None:
        """The token is over: nobody writes until the next one."""
        self.place = self.column = None

    def count(self) -> None:
        """One column more."""
        self.seen += 1

    def laid(self, part: Float[Tensor, "b h s p"]) -> Float[Tensor, "b h size p"]:
        """The latest columns, each at its place."""
        columns = torch.arange(self.seen - part.shape[2], self.seen, device=part.device)
        places = part.new_zeros(*part.shape[:2], self.size, part.shape[3])
        return places.index_copy_(2, columns % self.size, part)

    def taken(self, places: Float[Tensor, "b h size p"]) -> Float[Tensor, "b h s p"]:
        """The reverse: all columns that the next token will see, in order."""
        first = 0 if self.window is None else max(self.seen - self.window + 1, 0)
        columns = torch.arange(first, self.seen, device=places.device)
        return places.index_select(2, columns % self.size)


def _is_left(real: Bool[Tensor, "b s"]) -> bool:
    """Whether no row has padding behind its first token."""
    return bool((real[:, 1:] >= real[:, :-1]).all())


class StaticKeys(CacheLayerMixin):
    """The keys and values of a kept attention on a `Ring`, in place of the layer that grows with each token.

    transformers' own static layers keep Python numbers that a captured graph would repeat (`StaticSlidingWindowLayer`).
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, layer: DynamicLayer, ring: Ring) -> None:
        super().__init__()
        self.layer, self.ring, self.is_sliding = layer, ring, layer.is_sliding
        self.keys, self.values = ring.laid(layer.keys), ring.laid(layer.values)
        self.defers, self.new = False, None  # whether attention writes; what it is to write
        layer.keys = layer.values = None  # not before both are laid: memory may run out
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write one token's, or leave it to its attention, and give what stands at every place.

        Raises:
            RuntimeError: called by anybody but the decoder.
        """
        if self.ring.place is None:
            raise RuntimeError(HELD)
        if self.defers:
            self.new = key_states, value_states
        else:
            self.keys.index_copy_(2, self.ring.place, key_states)
            self.values.index_copy_(2, self.ring.place, value_states)
        return self.keys, self.values

    def given_back(self) -> DynamicLayer:
        """The layer that stood here, with all columns it would hold."""
        self.layer.keys, self.layer.values = self.ring.taken(self.keys), self.ring.taken(self.values)
        set_seen_tokens(self.layer, self.ring.seen)
        return self.layer

    def get_seq_length(self) -> int:
        return self.ring.seen

    def get_max_length(self) -> int:
        return self.ring.size

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.ring.size, 0

    def lazy_initialization(self, *unused, **keywords) -> None:
        raise RuntimeError(HELD)

    reorder_cache = batch_repeat_interleave = batch_select_indices = reset = crop = offload = prefetch = lazy_initialization


class StaticState:
    """A mixer's state, every tensor of which stays where it is from one token to the next.

    Args:
        tokens: how many are to come.
    """

    def __init__(self, state: MixerState, mixer: Mixer, layer: int, tokens: int) -> None:
        self.state, self.layer = state, layer
        self.first = self.length = state.length
        self.last_document = state.last_document  # every row goes on with it
        before = dict(state.tensors)
        try:
            for name, module in mixer.named_modules():
                if isinstance(module, Attention):
                    module.reserve(state.scope(name) if name else state, tokens)
            found = state.tensors.items()
            self.tensors = {name: part.clone(memory_format=torch.contiguous_format) for name, part in found}
        except BaseException:  # memory has run out: leave no empty places behind
            state.tensors = before
            raise
        self.grown = {name: before[name].shape[1] for name, part in found if part.shape != before.get(name, part).shape}
        self.rewind()

    def collect(self) -> None:
        """Copy what the call of one token has written anew to its place.

        Raises:
            GraphError: it has changed a shape or a type.
        """
        for name, new in self.state.tensors.items():
            place = self.tensors.get(name)
            if new is place:
                continue
            if name in self.grown and new.shape[1] > place.shape[1]:
                new = new[:, 1:]
            if place is None or new.shape != place.shape or new.dtype != place.dtype:
                raise GraphError(
                    f"{name} of layer {self.layer}'s state does not keep its shape and type from token to token"
                )
            if new.untyped_storage().data_ptr() == place.untyped_storage().data_ptr():
                new = new.clone()  # a copy onto itself, shifted, would read what it has written
            place.copy_(new)

    def rewind(self) -> None:
        """Let the state hold these tensors again, and the counts of the last token that was counted."""
        self.state.tensors, self.state.length, self.state.last_document = dict(self.tensors), self.length, self.last_document

    def is_held(self) -> bool:
        """Whether the state still holds these tensors: nobody has reordered it, or called the model with it."""
        return all(self.state.tensors.get(name) is part for name, part in self.tensors.items())

    def count(self) -> None:
        """One token more."""
        self.length += 1
        self.state.length = self.length

    def give_back(self) -> None:
        """Leave the state without its empty places."""
        for name, before in self.grown.items():
            held = self.tensors[name][:, -(before + self.length - self.first) :]
            self.state.tensors[name] = held.clone()
