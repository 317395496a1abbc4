"""Softmax attention as a mixer: full, or a sliding window with sinks (Samba's attention, StreamingLLM's window).

The projections keep the teacher's shapes, including its number of key heads. Each head's output has a trainable scale.
Neighbouring layers may share keys and values (Hymba, arXiv 2411.13676, section 2.2): a layer that reads those of another has
no k and v projections and no cache of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from students.kernels.attention import attention
from students.kernels.documents import positions as count_positions
from students.mixers.derived import derived, given
from students.mixers.held_attention import KEPT, HeldAttention, empty_places
from students.mixers.mixer import Context, Mixer, Shape
from students.mixers.transfer import Projections, Transfer
from students.shapes import Float, Int


def _by_head(parts: "AttentionParts") -> Float[Tensor, "b s h value"]:
    return parts.spread(parts.key_values)


@dataclass(frozen=True)
class AttentionParts:
    """Queries of the new tokens, and keys and values of all tokens that they may see, with documents and positions.

    Keys and values are stored by key head.
    """

    q: Float[Tensor, "b t h p"]
    keys: Float[Tensor, "b s kv p"]
    key_values: Float[Tensor, "b s kv value"]
    documents: Int[Tensor, "b s"] | None
    positions: Int[Tensor, "b s"] | None
    values: Float[Tensor, "b s h width"] | None = derived(_by_head)  # noqa: RUF009 - a descriptor

    @property
    def every(self) -> Float[Tensor, "b s h width"]:
        """The values of each head, given or derived."""
        return cast(Tensor, self.values)

    @property
    def k(self) -> Float[Tensor, "b s h p"]:
        """The key of each head."""
        return self.spread(self.keys)

    def spread(self, part: Float[Tensor, "b s kv p"]) -> Float[Tensor, "b s h p"]:
        """Keys or values of each head, from those of each key head."""
        return part.repeat_interleave(self.q.shape[2] // part.shape[2], 2)


class Attention(HeldAttention, Mixer):
    """Causal softmax attention.

    Args:
        borrowed: no projections of its own; a composed mixer passes it another branch's q, k and v, already scaled.
        reads: the key head of each head, where the heads of a composed mixer do not share key heads evenly.
    """

    only_attention = True
    copied: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    copied_role = "window"
    float32 = frozenset({"scale"})
    zero_options = frozenset({"sinks"})
    hidden_options = frozenset({"borrowed", "reads"})
    meanings = {
        "window": "Number of tokens that a token sees, itself included. Default: the teacher's.",
        "sinks": "Number of first tokens of a document that are always seen too.",
        "rope": "Rotate q and k by their positions. Default: as the teacher does.",
        "share_kv": "Read the keys and values of the nearest converted layer before this one that has its own. `orient` and "
        "`align` do not train the shared keys and values; end-to-end stages train both layers.",
    }

    def __init__(
        self,
        shape: Shape,
        *,
        window: int | None = None,
        sinks: int = 0,
        rope: bool | None = None,
        share_kv: bool = False,
        borrowed: bool = False,
        reads: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.n_heads, self.head_dim = shape.n_heads, shape.head_dim
        self.window, self.sinks = shape.window if window is None else window, sinks if window else 0
        self.horizon = self.window or 0
        self.rope = None if rope is False else shape.rope
        if rope and shape.rope is None:
            raise ValueError("rope: true, but the model's attention has no rotary embedding to take it from")
        self.softcap, self.logit_scale = shape.softcap, 1.0 if borrowed else shape.logit_scale
        self.scale = nn.Parameter(torch.ones(shape.n_heads))
        self.borrowed, self.share_kv, self.reads = borrowed, share_kv, reads
        key_heads = shape.n_kv_heads if reads is None else max(reads) + 1
        if not borrowed:
            width, kv_width = shape.n_heads * shape.head_dim, key_heads * shape.head_dim
            self.q_proj = nn.Linear(shape.d_model, width, bias=shape.qkv_bias)
            if not share_kv:
                self.k_proj = nn.Linear(shape.d_model, kv_width, bias=shape.qkv_bias)
                self.v_proj = nn.Linear(shape.d_model, kv_width, bias=shape.qkv_bias)
            self.o_proj = nn.Linear(width, shape.d_model, bias=shape.o_bias)
        self.qk_norm, self.qk_norm_eps = (None if borrowed else shape.qk_norm), shape.qk_norm_eps
        norms, kv_norms = self.qk_norm is not None, self.qk_norm is not None and not share_kv
        self.q_norm = nn.Parameter(torch.ones(shape.n_heads, shape.head_dim)) if norms else None
        self.k_norm = nn.Parameter(torch.ones(key_heads, shape.head_dim)) if kv_norms else None

    def project(self, h: Float[Tensor, "b t d"], context: Context) -> AttentionParts:
        names = ("q",) if self.share_kv else ("q", "k", "v")
        q, *kv = (getattr(self, f"{name}_proj")(h).unflatten(-1, (-1, self.head_dim)) for name in names)
        if self.share_kv:
            return self._shared(q, context)
        k, v = kv
        return self.arrange(q, k, v, context)

    def arrange(
        self,
        q: Float[Tensor, "b t h p"],
        k: Float[Tensor, "b t kv p"],
        v: Float[Tensor, "b t kv p"],
        context: Context,
    ) -> AttentionParts:
        """Normalise and rotate q and k, and append k and v to those in the state."""
        q, k = self._turned(q, self.q_norm, context), self._turned(k, self.k_norm, context)
        documents, positions = context.documents, None
        if context.state is not None or self.sinks:
            documents = context.ids(q)
            positions = count_positions(documents)
        if context.state is not None:
            k, v, documents, positions = self._remember(k, v, documents, positions, context)
        if context.shared is not None:
            context.shared.write(k, v, documents, positions)
        return self._parts(q, k, v, documents, positions)

    def _shared(self, q: Float[Tensor, "b t h p"], context: Context) -> AttentionParts:
        """The parts with the queries and an earlier layer's keys and values."""
        if context.shared is None:
            raise ValueError("this attention reads an earlier layer's keys and values (share_kv), but was given none")
        k, v, documents, positions = context.shared.read()
        if self.sinks and positions is None:  # a layer without sinks leaves no positions
            documents = context.ids(q)
            positions = count_positions(documents)
        return self._parts(self._turned(q, self.q_norm, context), k, v, documents, positions)

    def _parts(self, q, k, v, documents, positions) -> AttentionParts:
        if self.reads is not None:  # an index by a list would wait for the GPU
            k, v = (torch.stack([part[:, :, head] for head in self.reads], 2) for part in (k, v))
        return AttentionParts(q, k, v, documents, positions)

    def mix(self, parts: AttentionParts, context: Context) -> Float[Tensor, "b t h value"]:
        return attention(
            parts.q,
            parts.keys,
            parts.key_values if given(parts, "values") is None else parts.every,
            scale=self.logit_scale,
            softcap=self.softcap,
            window=self.window,
            sinks=self.sinks,
            documents=parts.documents,
            positions=parts.positions,
        )

    def features(self, y: Float[Tensor, "b t h p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h p"]:
        return y * self.scale.to(y.dtype)[:, None]

    def out_weight(self) -> tuple[Float[Tensor, "h d p"], Float[Tensor, " d"] | None]:
        return self.o_proj.weight.unflatten(1, (self.n_heads, -1)).transpose(0, 1), self.o_proj.bias

    def out(self, features: Float[Tensor, "b t h p"]) -> Float[Tensor, "b t d"]:
        return self.o_proj(features.flatten(2))

    def _remember(self, k, v, documents, positions, context):
        """Append the new tokens to the kept ones; the state keeps the last `window`, and the sinks that leave it."""
        state = context.state
        kept = {name: state.read(name) for name in KEPT}
        if kept["k"] is not None:
            first_run = positions == torch.arange(positions.shape[1], device=positions.device)
            before = state.resumed(documents[:, 0]) * (kept["positions"][:, -1] + 1)
            positions = positions + first_run * before[:, None]
        joined = {"k": k, "v": v, "documents": documents, "positions": positions}
        if kept["k"] is not None:
            joined = {name: torch.cat([kept[name].to(new.dtype), new], 1) for name, new in joined.items()}
        sinks = {name: state.read(f"sink_{name}") for name in joined}
        seen = joined
        if sinks["k"] is not None:
            seen = {name: torch.cat([sinks[name].to(new.dtype), new], 1) for name, new in joined.items()}
        leaving = 0 if self.window is None else max(joined["k"].shape[1] - self.window, 0)
        if leaving and self.sinks:
            gone = {name: part[:, :leaving] for name, part in joined.items()}
            state.write(**{f"sink_{name}": part for name, part in self._keep_sinks(sinks, gone).items()})
        state.write(**{name: part[:, leaving:] for name, part in joined.items()})
        return seen["k"], seen["v"], seen["documents"], seen["positions"]

    def _keep_sinks(self, sinks: dict[str, Tensor | None], gone: dict[str, Tensor]) -> dict[str, Tensor]:
        """Store tokens that leave the window in the sinks: place i takes the last such token whose position is i."""
        before = cast(dict[str, Tensor], empty_places(gone, self.sinks) if sinks["k"] is None else sinks)
        slots = torch.arange(self.sinks, device=gone["positions"].device)
        fits = gone["positions"][:, None] == slots[:, None]  # [b sink leaving]
        found = fits.any(-1)
        last = (fits * torch.arange(1, fits.shape[-1] + 1, device=fits.device)).argmax(-1)  # [b sink]
        kept = {}
        for name, part in gone.items():
            tail = (1,) * (part.dim() - 2)
            taken = part.gather(1, last.view(*last.shape, *tail).expand(-1, -1, *part.shape[2:]))
            kept[name] = torch.where(found.view(*found.shape, *tail), taken, before[name])
        return kept

    @torch.no_grad()
    def from_attention(self, attention: Projections) -> Transfer:
        transfer = Transfer()
        transfer.set("scale", "set to 1")
        self.scale.fill_(1.0)
        if self.borrowed:
            return transfer
        for name in ("q_norm", "k_norm"):
            if getattr(self, name) is None:
                continue
            getattr(self, name).copy_(getattr(attention, name))
            transfer.set(name, f"copied from attention {name}")
            transfer.used.add(name)
        for name in "qo" if self.share_kv else "qkvo":
            weight, bias = getattr(attention, name), getattr(attention, f"{name}_bias")
            projection = getattr(self, f"{name}_proj")
            projection.weight.copy_(weight.transpose(0, 1).flatten(1) if name == "o" else weight.flatten(0, 1))
            transfer.set(f"{name}_proj.weight", f"copied from attention {name}")
            transfer.used.add(name)
            if projection.bias is not None:
                projection.bias.copy_(torch.zeros_like(projection.bias) if bias is None else bias.flatten())
                copied = bias is not None
                transfer.set(f"{name}_proj.bias", f"copied from attention {name} bias" if copied else "set to 0")
                transfer.used |= {f"{name}_bias"} if copied else set()
        return transfer

    def head_terms(self) -> list[list[int]]:
        return [[head] for head in range(self.n_heads)]

    @torch.no_grad()
    def rescale(self, factors: Float[Tensor, " h"]) -> None:
        self.scale.mul_(factors)
