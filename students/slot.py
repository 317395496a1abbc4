"""MixerSlot: the module that replaces an attention module inside the skeleton's layer, and holds a mixer."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from students.cache import MixerState
from students.kernels.documents import documents_of
from students.mixers.entering import Entering
from students.mixers.mixer import Context, Mixer
from students.padding import Unpadded
from students.shapes import Float


class MixerSlot(nn.Module):
    """Calls a mixer the way the skeleton calls its attention.

    The skeleton passes hidden states, rotary tables and its cache by keyword; the student's `forward` adds the keyword
    `document_ids`. The cache is recognised by its type, because families and versions of transformers call it
    `past_key_values`, `cache` or `layer_past`. The attention mask is not used: documents describe padding and packing. In
    families that drop unknown keywords, documents are read from the positions (`documents` is "positions"). Padding that
    mixers do not support is removed here, as the keyword `unpadded` describes. `keys_of`: the layer whose keys and values
    the mixer provides or reads, if any; they are passed as `shared_keys`.
    """

    def __init__(self, mixer: Mixer, layer_index: int, documents: str = "keywords", keys_of: int | None = None) -> None:
        super().__init__()
        self.keys_of = keys_of
        self.mixer, self.layer_index, self.documents = mixer, layer_index, documents

    def forward(
        self, hidden_states: Float[Tensor, "b t d"], *unused: Any, **keywords: Any
    ) -> tuple[Float[Tensor, "b t d"], None]:
        """The mixer's output, and None in place of attention weights."""
        context, unpadded = self._context(hidden_states, keywords)
        mixed = self.mixer(hidden_states, context) if unpadded is None else self._in_parts(hidden_states, context, unpadded)
        return mixed, None

    def token(self, entering: Entering, residual: Float[Tensor, "b 1 d"], **keywords: Any) -> Float[Tensor, "b 1 d"]:
        """`residual` plus the mixer's output for one token while a decoder holds the states; the input's norm is fused."""
        context, unpadded = self._context(entering.x, keywords)
        if unpadded is not None or context.turn is None:
            return residual + self(entering.h, **keywords)[0]
        return self.mixer.token(entering, context, residual)

    def _context(self, hidden_states: Float[Tensor, "b t d"], keywords: dict) -> tuple[Context, Unpadded | None]:
        """The mixer's context from the skeleton's keywords, and how padding is removed."""
        cache = next((value for value in keywords.values() if isinstance(value, Cache)), None)
        documents, unpadded = keywords.get("document_ids"), keywords.get("unpadded")
        state = None if cache is None else cast(MixerState, cache.layers[self.layer_index])
        if state is not None:
            state.check_turn(hidden_states.shape[1])
        if self.documents == "positions":
            positions = keywords["position_ids"]
            documents = documents_of(positions, hidden_states.shape[0], cache is not None)
            if positions.dtype == torch.int32:  # int32 says that the positions mark padding
                unpadded = Unpadded.of(cast(Tensor, documents), state is not None and state.length > 0, state is not None)
        context = Context(
            documents=documents,
            rope=keywords.get("position_embeddings"),
            state=state,
            shared=None if self.keys_of is None else keywords["shared_keys"][self.keys_of],
        )
        return context, unpadded

    def _in_parts(self, h: Float[Tensor, "b t d"], context: Context, unpadded: Unpadded) -> Float[Tensor, "b t d"]:
        """The mixer's output at tokens, and 0 at padding."""
        out, batch = torch.zeros_like(h), h.shape[0]
        whole = cast(MixerState | None, context.state)  # the slot's own state, not a scope of it
        states: list[tuple[Tensor, MixerState]] = []
        for number, part in enumerate(unpadded.parts):
            state, rope = whole, context.rope
            if state is not None and part.rows is not None:
                state = state.rows(part.rows)
                states.append((part.rows.to(h.device), state))
            own = replace(
                context,
                documents=part.documents.to(h.device),
                rope=None if rope is None else (part.taken(rope[0], batch), part.taken(rope[1], batch)),
                state=state,
                shared=None if context.shared is None else context.shared.part(number),
            )
            mixed = self.mixer(part.taken(h, batch), own)
            out = part.put(out.to(mixed.dtype), mixed)
        if whole is not None and (states or not unpadded.parts):
            whole.join(states, batch, h.shape[1])
        return out
