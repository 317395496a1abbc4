"""The context of a mixer's call: documents, rotary tables, the state of earlier calls, shared keys."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from students.cache import MixerState, ScopedState, Turn
from students.mixers.sharing import SharedKeys
from students.shapes import Bool, Float, Int


@dataclass(frozen=True)
class Context:
    """What a mixer gets in addition to its input.

    documents: each token's document, negative for padding; None where every row is one document, which continues that of
    the state if there is one. rope: the skeleton's cosines and sines, [b t r]. state: from earlier calls; None outside
    generation. shared: keys and values that one layer's attention writes and later layers read.
    """

    documents: Int[Tensor, "b t"] | None = None
    rope: tuple[Tensor, Tensor] | None = None
    state: MixerState | ScopedState | None = None
    shared: SharedKeys | None = None

    @classmethod
    def unrotated(cls, h: Float[Tensor, "b t d"], width: int) -> "Context":
        """A context with rotary tables of `width` channels that rotate nothing, for calibration on inputs alone."""
        angles = h.new_zeros(*h.shape[:2], width)
        return cls(rope=(angles.cos(), angles.sin()))

    @property
    def held(self) -> MixerState | ScopedState:
        """The state, which must exist."""
        assert self.state is not None, "outside generation there is no state"
        return self.state

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """The rotary tables, for mixers that rotate."""
        assert self.rope is not None, "the skeleton gives rotary tables to mixers that rotate"
        return self.rope

    @property
    def column(self) -> Int[Tensor, " 1"]:
        """The column of the current token while a `Decoder` holds the state."""
        assert self.turn is not None, "no decoder holds the state"
        return self.turn.column

    @property
    def turn(self) -> Turn | None:
        """The position of the current token while a `Decoder` holds the state; None otherwise."""
        return None if self.state is None else self.state.turn

    def ids(self, like: Float[Tensor, "b t ..."]) -> Int[Tensor, "b t"]:
        """The documents as a tensor, also where `documents` is None."""
        if self.documents is not None:
            return self.documents
        if self.state is not None and self.state.last_document is not None:
            return self.state.last_document[:, None].expand(like.shape[:2])
        return torch.zeros(like.shape[:2], dtype=torch.long, device=like.device)

    def resumed(self, like: Float[Tensor, "b t ..."]) -> Bool[Tensor, " b"] | None:
        """Whether each row's first token continues the document in which the state ended; None if all are known to."""
        if self.documents is None and self.held.length:
            return None
        return self.held.resumed(self.ids(like)[:, 0])

    def scope(self, prefix: str) -> "Context":
        """The same context for one branch of a composed mixer."""
        return self if self.state is None else replace(self, state=self.state.scope(prefix))
