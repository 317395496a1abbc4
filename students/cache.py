"""The state of a mixer between the calls of a generation: one layer of transformers' `Cache`."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from students.kernels.documents import NOWHERE, PADDING
from students.shapes import Bool, Int

HELD = "a Decoder holds this cache; release() gives it back"


class Turn:
    """The position of a `Decoder`'s current token, by which states are written in place: as rings, whose entries never move.

    Args:
        first: the column of the decoder's first token. column: the column of the current token, on the device.
    """

    def __init__(self, first: int, column: Int[Tensor, " 1"]) -> None:
        self.first, self.column, self.open = first, column, False

    def laid(self, part: Tensor, size: int) -> Tensor:
        """A ring of `size` columns, filled with the latest columns of a tensor [b s ...]."""
        part = part[:, -size:]
        columns = torch.arange(self.first - part.shape[1], self.first, device=part.device)
        return part.new_zeros(part.shape[0], size, *part.shape[2:]).index_copy_(1, columns % size, part)

    def taken(self, ring: Tensor, count: int, steps: int) -> Tensor:
        """The reverse of `laid`, after `steps` tokens: the latest `count` columns in order."""
        end = self.first + steps
        return ring.index_select(1, torch.arange(end - count, end, device=ring.device) % ring.shape[1])


def empty_place(name: str) -> int:
    """The filler of a state's tensor of this name, for places where a row has no token."""
    if name.endswith(("document", "documents")):
        return NOWHERE
    return PADDING if name.endswith("positions") else 0


class MixerState(CacheLayerMixin):
    """Named tensors of one mixer, batch first, and the number of tokens that they have read.

    Convolution tails, recurrent states and windows of keys and values are all kept here, so batch reordering and beam search
    are implemented once. `get_seq_length` is the length of the sequence and not of the tensors: transformers makes the masks
    of attention layers from it, also where no attention layer is left.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.length = 0
        self.last_document: Int[Tensor, " b"] | None = None  # None: no call gave documents; each row is document 0
        self.turn: Turn | None = None  # set while a Decoder holds the state in place

    def read(self, name: str) -> Tensor | None:
        """The tensor kept under `name`, or None before the first call."""
        return self.tensors.get(name)

    def kept(self, name: str) -> Tensor:
        """The tensor under `name`, which an earlier call has written."""
        return self.tensors[name]

    def write(self, **tensors: Tensor) -> None:
        """Keep these tensors; the batch is the first dimension of each.

        A short view of a much longer tensor is copied, so that the whole prompt does not stay in memory. Where a `Decoder`
        holds the state, values are copied into the tensors that it holds.

        Raises:
            ValueError: a tensor's shape or type differs from that of the held one.
        """
        if self.turn is not None:
            self._put(tensors)
            return
        for name, tensor in tensors.items():
            whole = tensor.untyped_storage().nbytes()
            self.tensors[name] = tensor.clone() if whole > 2 * tensor.nbytes else tensor

    def drop(self, name: str) -> None:
        """Remove the tensor under `name`."""
        self.tensors.pop(name, None)

    def _put(self, tensors: dict[str, Tensor]) -> None:
        for name, new in tensors.items():
            place = self.tensors.get(name)
            if new is place:
                continue
            if place is None or new.shape != place.shape or new.dtype != place.dtype:
                raise ValueError(f"{name} of the state does not keep its shape and type from token to token")
            place.copy_(new)

    def check_turn(self, tokens: int) -> None:
        """Refuse calls while a `Decoder` holds this state, other than the decoder's own.

        Raises:
            RuntimeError: another caller, or more than one token.
        """
        if self.turn is not None and not (self.turn.open and tokens == 1):
            raise RuntimeError(HELD)

    def resumed(self, first_document: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Whether each row's next token, of document `first_document`, continues the document in which the state ended."""
        if not self.length:
            return torch.zeros_like(first_document, dtype=torch.bool)
        return first_document == (0 if self.last_document is None else self.last_document)

    def advance(self, tokens: int, documents: Int[Tensor, "b t"] | None) -> None:
        """Count the tokens of one call, after every tensor was written; without `documents` they continue the last ones.

        While a `Decoder` holds the state, the decoder counts instead: a replayed graph runs no Python.
        """
        if self.turn is not None:
            return
        self.length += tokens
        self.last_document = self.last_document if documents is None else documents[:, -1]
        self.is_initialized = True

    def scope(self, prefix: str) -> "ScopedState":
        """The same state with `prefix` before every name, for one part of a composed mixer."""
        return ScopedState(self, prefix)

    def rows(self, rows: Int[Tensor, " r"]) -> "MixerState":
        """A state of these rows alone, for a call without the other rows."""
        self._check_free()
        part = MixerState()
        part.length, part.is_initialized, part.last_document = self.length, self.is_initialized, self.last_document
        part.tensors = dict(self.tensors)
        part.batch_select_indices(rows)
        return part

    def join(self, parts: Sequence[tuple[Int[Tensor, " r"], "MixerState"]], batch: int, tokens: int) -> None:
        """Take over the rows of `parts` after a call of `tokens` tokens a row; other rows stay unchanged.

        Rows whose tensors are shorter than others' get empty places in front.
        """
        names = dict.fromkeys(name for state in (self, *(part for _, part in parts)) for name in state.tensors)
        for name in names:
            found: list[tuple[Tensor | slice, Tensor]] = []
            if name in self.tensors:
                found.append((slice(None), self.tensors[name]))
            found += [(rows, part.tensors[name]) for rows, part in parts if name in part.tensors]
            self.tensors[name] = _joined(name, found, batch)
        if self.last_document is not None:
            for rows, part in parts:
                self.last_document = self.last_document.index_copy(0, rows, cast(Tensor, part.last_document))
        self.length += tokens

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("a mixer's state has no keys and values to initialise; the mixer writes it")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a mixer's state is written by its mixer, not through update()")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "a recurrent state cannot forget its last tokens: assisted generation and cache rollback need attention only"
        )

    def reset(self) -> None:
        self._check_free()
        self.tensors.clear()
        self.length, self.last_document, self.is_initialized = 0, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        raise NotImplementedError("a mixer's state is small and stays on its layer's device; use a cache without offloading")

    prefetch = offload

    def _check_free(self) -> None:
        if self.turn is not None:
            raise RuntimeError(HELD)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self._check_free()
        self.tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        if self.last_document is not None:
            self.last_document = change(self.last_document)


def _joined(name: str, found: list[tuple[Tensor | slice, Tensor]], batch: int) -> Tensor:
    """One tensor made from the rows of several; where a row occurs twice, the later one counts."""
    latest = found[-1][1]
    if latest.dim() < 2:
        whole = latest.new_full((batch,), empty_place(name))
    else:
        longest = max(tensor.shape[1] for _, tensor in found)
        whole = latest.new_full((batch, longest, *latest.shape[2:]), empty_place(name))
    for rows, tensor in found:
        if tensor.dim() < 2:
            whole[rows] = tensor
        else:
            whole[rows, whole.shape[1] - tensor.shape[1] :] = tensor.to(whole.dtype)
    return whole


class ScopedState:
    """A `MixerState` for one part of a composed mixer, with a prefix before its names; the length is shared."""

    def __init__(self, state: MixerState, prefix: str) -> None:
        self._state, self._prefix = state, prefix

    def read(self, name: str) -> Tensor | None:
        return self._state.read(f"{self._prefix}.{name}")

    def kept(self, name: str) -> Tensor:
        return self._state.kept(f"{self._prefix}.{name}")

    def write(self, **tensors: Tensor) -> None:
        self._state.write(**{f"{self._prefix}.{name}": tensor for name, tensor in tensors.items()})

    def drop(self, name: str) -> None:
        self._state.drop(f"{self._prefix}.{name}")

    @property
    def length(self) -> int:
        return self._state.length

    @property
    def turn(self) -> Turn | None:
        return self._state.turn

    @property
    def last_document(self) -> Int[Tensor, " b"] | None:
        return self._state.last_document

    def resumed(self, first_document: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
        return self._state.resumed(first_document)

    def scope(self, prefix: str) -> "ScopedState":
        return ScopedState(self._state, f"{self._prefix}.{prefix}")
