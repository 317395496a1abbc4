"""Cache layers with static tensors, for decoding token by token without new memory."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from students.cache import HELD, MixerState, Turn
from students.compat import set_seen_tokens
from students.mixers.mixer import Mixer
from students.shapes import Bool, Float, Int

EVEN = 8  # ring sizes are multiples of this, so that attention kernels need not pad their mask


class GraphError(RuntimeError):
    """A model or cache that cannot be decoded in place, or not as a CUDA graph."""


class Ring:
    """The places of columns in a static cache, for all layers with one window: column c is stored at place c % size.

    A new column overwrites one that is no longer seen. With padding on the left, `start` [b] is the first column that each
    row sees; with padding elsewhere, `mask` [b size] marks the places that it sees.

    Args:
        window: columns that a token sees, its own included (None: all). seen: columns so far. tokens: columns still to come.
        real: which columns are tokens and not padding; None where all are.
    """

    def __init__(
        self, window: int | None, seen: int, tokens: int, real: Bool[Tensor, "b s"] | None, device: torch.device
    ) -> None:
        self.window, self.seen, self.real = window, seen, real
        self.size = -(-(seen + tokens) // EVEN) * EVEN
        self.size = self.size if window is None else min(window, self.size)
        self.column: Int[Tensor, " 1"] | None = None  # of the current token
        self.place: Int[Tensor, " 1"] | None = None
        self.start: Int[Tensor, " b"] | None = None
        self.mask: Bool[Tensor, "b size"] | None = None
        self.inner = real is not None and not _is_left(real)
        if real is not None and self.inner and self.size >= real.shape[1]:  # every column at its own place
            self.mask = nn.functional.pad(real, (0, self.size - real.shape[1]), value=True)
        elif real is not None and not self.inner:
            self.start = real.long().argmax(1)

    def turn(self, column: Int[Tensor, " 1"]) -> None:
        """Set the current column and its `place`."""
        self.column, self.place = column, column % self.size
        if self.real is not None and self.inner and self.size < self.real.shape[1]:
            self.mask = self.visible()

    def visible(self) -> Bool[Tensor, "rows size"]:
        """Which places the current token sees, for attention that takes a mask."""
        assert self.column is not None, "there is a current token"
        places = torch.arange(self.size, device=self.column.device)
        held = self.column - (self.column - places) % self.size  # the column that is stored at each place
        visible = (held >= 0)[None]
        return visible if self.real is None else visible & self.real[:, held.clamp(min=0)]

    def close(self) -> None:
        """End the current token; writes are refused until the next `turn`."""
        self.place = self.column = None

    def count(self) -> None:
        """Count one more column."""
        self.seen += 1

    def laid(self, part: Float[Tensor, "b h s p"]) -> Float[Tensor, "b h size p"]:
        """A tensor of places, filled with the latest columns."""
        columns = torch.arange(self.seen - part.shape[2], self.seen, device=part.device)
        places = part.new_zeros(*part.shape[:2], self.size, part.shape[3])
        return places.index_copy_(2, columns % self.size, part)

    def taken(self, places: Float[Tensor, "b h size p"]) -> Float[Tensor, "b h s p"]:
        """The reverse of `laid`: all columns that the next token will see, in order."""
        first = 0 if self.window is None else max(self.seen - self.window + 1, 0)
        columns = torch.arange(first, self.seen, device=places.device)
        return places.index_select(2, columns % self.size)


def _is_left(real: Bool[Tensor, "b s"]) -> bool:
    """Whether no row has padding after its first token."""
    return bool((real[:, 1:] >= real[:, :-1]).all())


class StaticKeys(CacheLayerMixin):
    """The keys and values of a kept attention on a `Ring`, in place of transformers' growing cache layer.

    transformers' static layers (`StaticSlidingWindowLayer`) are not used: they count in Python, and a captured graph would
    repeat the same number.
    """

    is_compileable = False
    is_croppable = False

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer, ring: Ring) -> None:
        super().__init__()
        self.layer, self.ring, self.is_sliding = layer, ring, layer.is_sliding
        self.keys, self.values = (ring.laid(cast(Tensor, part)) for part in (layer.keys, layer.values))
        self.defers = False  # whether attention writes new keys and values
        self.new: tuple[Tensor, Tensor] | None = None  # the keys and values that attention will write
        layer.keys = layer.values = None  # only after both are copied, because memory may run out
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values, or leave that to its attention (`defers`), and return all places.

        Raises:
            RuntimeError: called by other code than the decoder.
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
        """The replaced layer, with the columns that it would hold."""
        self.layer.keys, self.layer.values = self.ring.taken(self.keys), self.ring.taken(self.values)
        set_seen_tokens(self.layer, self.ring.seen)
        return self.layer

    def get_seq_length(self) -> int:
        return self.ring.seen

    def get_max_length(self) -> int:
        return self.ring.size

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.ring.size, 0

    def lazy_initialization(self, *unused: Any, **keywords: Any) -> None:
        raise RuntimeError(HELD)

    reorder_cache = batch_repeat_interleave = batch_select_indices = reset = crop = offload = prefetch = lazy_initialization


class StaticState:
    """A mixer's state with static tensors; tensors that grow or shift with the sequence become rings (`Mixer.hold`).

    Args:
        tokens: the most tokens to come. turn: the position of the current token.
    """

    def __init__(self, state: MixerState, mixer: Mixer, tokens: int, turn: Turn) -> None:
        self.state, self.turn, self.steps = state, turn, 0
        self.parts = [
            (part, state.scope(name) if name else state) for name, part in mixer.named_modules() if isinstance(part, Mixer)
        ]
        before = dict(state.tensors)
        try:
            for part, own in self.parts:
                part.hold(own, turn, tokens)
            for name, tensor in state.tensors.items():
                if tensor is before.get(name):
                    state.tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        except BaseException:  # such as out of memory: keep no static tensors
            state.tensors = before
            raise
        state.turn = turn

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The held tensors by name."""
        return self.state.tensors

    def count(self) -> None:
        """Count one more token."""
        self.steps += 1
        self.state.length += 1

    def give_back(self) -> None:
        """Restore the form that ordinary calls give the state."""
        self.state.turn = None
        for part, own in self.parts:
            part.give_back(own, self.turn, self.steps)
