"""What a mixer may know beside its input: documents, rotary tables, the state of earlier calls, keys that layers share."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from students.cache import MixerState, ScopedState, Turn
from students.mixers.sharing import SharedKeys
from students.shapes import Bool, Float, Int


@dataclass(frozen=True)
class Context:
    """What a mixer may know beside its input.

    documents: each token's document; negative for padding; None where every row is one, that of the state if any.
    rope: the skeleton's cosines and sines, [b t r]. state: what earlier calls left, or None outside generation.
    shared: where an attention that others share leaves its keys and values, and those others find them.
    """

    documents: Int[Tensor, "b t"] | None = None
    rope: tuple[Tensor, Tensor] | None = None
    state: MixerState | ScopedState | None = None
    shared: SharedKeys | None = None

    @classmethod
    def unrotated(cls, h: Float[Tensor, "b t d"], width: int) -> "Context":
        """For work on inputs alone: rotary tables of so many channels that leave every token where it is."""
        angles = h.new_zeros(*h.shape[:2], width)
        return cls(rope=(angles.cos(), angles.sin()))

    @property
    def held(self) -> MixerState | ScopedState:
        """The state, of calls that have one."""
        assert self.state is not None, "outside generation there is no state"
        return self.state

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """The rotary tables, for mixers that rotate."""
        assert self.rope is not None, "the skeleton gives rotary tables to mixers that rotate"
        return self.rope

    @property
    def column(self) -> Int[Tensor, " 1"]:
        """The column of the token under way, where the state is held in place."""
        assert self.turn is not None, "no decoder holds the state"
        return self.turn.column

    @property
    def turn(self) -> Turn | None:
        """The token under way, where the state is held in place."""
        return None if self.state is None else self.state.turn

    def ids(self, like: Float[Tensor, "b t ..."]) -> Int[Tensor, "b t"]:
        """The documents, spelled out where they are None."""
        if self.documents is not None:
            return self.documents
        if self.state is not None and self.state.last_document is not None:
            return self.state.last_document[:, None].expand(like.shape[:2])
        return torch.zeros(like.shape[:2], dtype=torch.long, device=like.device)

    def resumed(self, like: Float[Tensor, "b t ..."]) -> Bool[Tensor, " b"] | None:
        """Rows whose first token goes on with the document that the state ended in; None where it is known to be all."""
        if self.documents is None and self.held.length:
            return None
        return self.held.resumed(self.ids(like)[:, 0])

    def scope(self, prefix: str) -> "Context":
        """The same context for one branch of a composed mixer."""
        return self if self.state is None else replace(self, state=self.state.scope(prefix))
