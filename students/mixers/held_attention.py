"""The attention mixer's part of decoding with a `Decoder`: windows are rings, and a token writes one column."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from students.cache import MixerState, ScopedState, Turn, empty_place
from students.kernels.heads import qk_norm
from students.kernels.window_token import Keys, Norms, attend, held_positions, window_token
from students.mixers.context import Context
from students.mixers.entering import Entering, Entry, leaving
from students.mixers.projections import rotate
from students.shapes import Float

KEPT = ("k", "v", "documents", "positions")  # tensors of the state with an entry for each token


class HeldAttention:
    """Base of `Attention`, which sets and explains these attributes."""

    head_dim: int
    window: int | None
    sinks: int
    rope: str | None
    softcap: float | None
    logit_scale: float
    scale: nn.Parameter
    borrowed: bool
    share_kv: bool
    reads: Sequence[int] | None
    qk_norm: str | None
    qk_norm_eps: float
    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None
    o_proj: nn.Linear

    def entries(self) -> list[Entry]:
        if self.borrowed:
            return []
        return [Entry(getattr(self, f"{name}_proj")) for name in (("q",) if self.share_kv else ("q", "k", "v"))]

    def token_features(
        self, entering: Entering, context: Context, share: Float[Tensor, "b h"] | None = None
    ) -> Float[Tensor, "b 1 h p"]:
        """share: see `window_token`; only for attention with its own keys."""
        q, *kv = (entering(entry)[:, 0].unflatten(-1, (-1, self.head_dim)) for entry in self.entries())
        if self.share_kv:
            return self._token_shared(q, entering.x.dtype, context)
        k, v = kv
        return self.token_attend(q, k, v, entering.x.dtype, context, share)

    def token_attend(
        self,
        q: Float[Tensor, "b h p"],
        k: Float[Tensor, "b kv p"],
        v: Float[Tensor, "b kv p"],
        dtype: torch.dtype,
        context: Context,
        share: Float[Tensor, "b h"] | None = None,
    ) -> Float[Tensor, "b 1 h p"]:
        """The features, in `dtype`, of one token on a held state."""
        keys, column, norms = self._keys(context.held), context.column, None
        if self.qk_norm:
            assert self.q_norm is not None and self.k_norm is not None, "attention with keys of its own normalises both"
            norms = Norms(self.q_norm, self.k_norm, self.qk_norm, self.qk_norm_eps)
        y = window_token(
            q,
            k,
            v,
            keys,
            column,
            dtype,
            scale=self.logit_scale,
            softcap=self.softcap,
            rope=(*context.tables, self.rope) if self.rope else None,
            norms=norms,
            factors=self.scale,
            reads=self.reads,
            share=share,
        )
        if context.shared is not None:
            held, values, positions = held_positions(keys, column)
            context.shared.write(held, values, None, positions)
        return y[:, None]

    def _token_shared(self, q: Float[Tensor, "b h p"], dtype: torch.dtype, context: Context) -> Float[Tensor, "b 1 h p"]:
        """The features of one token with an earlier layer's keys and values, which include the token's own."""
        assert context.shared is not None, "attention that shares keys gets them in the context"
        k, v, _, positions = context.shared.read()
        assert positions is not None, "shared keys of a held cache have positions"
        q = self._turned(q[:, None], self.q_norm, context)[:, 0]
        visible = positions >= 0
        if self.window is not None:
            visible &= (positions > positions.amax(1, keepdim=True) - self.window) | (positions < self.sinks)
        y = attend(q.to(k.dtype), k, v, self.logit_scale, self.softcap, mask=visible)
        return (y * self.scale.to(y.dtype)[:, None]).to(dtype)[:, None]

    def _turned(self, heads: Float[Tensor, "b t h p"], norm: Tensor | None, context: Context) -> Float[Tensor, "b t h p"]:
        if self.qk_norm:
            assert norm is not None, "attention with norms has their weights"
            heads = qk_norm(heads, norm, self.qk_norm, self.qk_norm_eps)
        return rotate(heads, context.tables, self.rope) if self.rope else heads

    def token_out(
        self, features: Float[Tensor, "b 1 k p"], residual: Float[Tensor, "b 1 d"] | None
    ) -> Float[Tensor, "b 1 d"]:
        return leaving(self.o_proj, features.flatten(2), residual)

    def _keys(self, state: MixerState | ScopedState) -> Keys:
        k, v, offset = (state.kept(name) for name in ("k", "v", "offset"))
        sinks = None if state.read("sink_k") is None else (state.kept("sink_k"), state.kept("sink_v"))
        return Keys(k, v, offset, self.window, sinks)

    def hold(self, state: MixerState | ScopedState, turn: Turn, tokens: int) -> None:
        """Turn keys and values into rings for `tokens` more tokens.

        With a window the rings have one place more than it, so that the token that leaves stays until the next one comes.
        Places for sinks are added if tokens will leave the window.
        """
        if state.read("k") is None:  # it reads another layer's
            return
        kept = {name: state.kept(name) for name in KEPT}
        room = kept["k"].shape[1] + tokens
        size = room if self.window is None else min(room, self.window + 1)
        offset = kept["positions"][:, -1] + 1 - turn.first
        if self.window is not None and self.sinks and room > self.window and state.read("sink_k") is None:
            state.write(**{f"sink_{name}": part for name, part in empty_places(kept, self.sinks).items()})
        state.write(offset=offset, **{name: turn.laid(kept[name], size) for name in "kv"})

    def give_back(self, state: MixerState | ScopedState, turn: Turn, steps: int) -> None:
        if state.read("documents") is None:
            return
        documents, positions = state.kept("documents"), state.kept("positions")
        seen = documents.shape[1] + steps
        kept = seen if self.window is None else min(seen, self.window)
        state.write(**{name: turn.taken(state.kept(name), kept, steps) for name in "kv"})
        state.drop("offset")
        latest = positions[:, -1:] + steps
        last = torch.zeros_like(latest) if state.last_document is None else state.last_document[:, None]
        if self.window is not None and self.sinks and seen <= self.window > documents.shape[1]:  # no token has left
            for name in KEPT:
                state.drop(f"sink_{name}")
        elif self.window is not None and self.sinks and steps:
            slots = torch.arange(self.sinks, device=latest.device)
            left = slots <= latest - self.window
            state.write(
                sink_documents=torch.where(left, last, state.kept("sink_documents")),
                sink_positions=torch.where(left, slots, state.kept("sink_positions")),
            )
        coming = latest - torch.arange(steps - 1, -1, -1, device=latest.device)
        documents = torch.cat([documents, last.expand(-1, steps)], 1)[:, -kept:]
        positions = torch.cat([positions, coming], 1)[:, -kept:]
        state.write(documents=documents.contiguous(), positions=positions.contiguous())


def empty_places(like: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """`count` empty places for each tensor of a state."""
    return {name: part.new_full((part.shape[0], count, *part.shape[2:]), empty_place(name)) for name, part in like.items()}
