"""The base class of all token mixers: the contract that slots, stages, reports and tests rely on.

A mixer maps the slot's input h [b t d] to its output [b t d] in three steps:

    parts = project(h)            operations on single tokens or a few neighbours
    y     = mix(parts)            exchange between tokens; linear in parts.values
    out   = output(y, h)          gates, norms and scales, then the projection back to d

y [b t k p] has k terms: the heads of every branch. `mix` is linear in the values, so each term has a matrix,
y_k = M_k values_k, and mixers are compared with attention by these matrices. A mixer in which each channel of a head forgets
at its own rate (`per_channel`) has a matrix for each channel; pictures show their mean over a head (arXiv 2403.01590).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from students.cache import MixerState
from students.mixers.context import Context
from students.mixers.entering import Entering
from students.mixers.in_place import InPlace
from students.mixers.transfer import Projections, Transfer
from students.shapes import Float
from students.wrapped import loaded

ROPES = ("half", "pairs")
QK_NORMS = ("rms", "rms_wide", "layer")
MATRIX_BLOCK = 64  # columns of the identity sent through `mix` at a time


@dataclass(frozen=True)
class Shape:
    """The attention that a mixer replaces: sizes, biases, and operations on its logits.

    softmax_scale: multiplies the logits (None: 1 / sqrt(head_dim)). softcap: c in c tanh(logits / c). window: tokens that
    a token sees, itself included (None: all). rope: how q and k are rotated, by "half" (channel i with i + r / 2), by
    "pairs" (2 i with 2 i + 1) or not at all. qk_norm: the norm on q and k: "rms" over each head, "rms_wide" over all heads
    together, "layer" over each head with its mean removed, or None; qk_norm_eps: its epsilon. norm_eps: the epsilon of the
    skeleton's norms, for norms that a mixer adds.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    rope: str | None = "half"
    softmax_scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    qk_norm: str | None = None
    qk_norm_eps: float = 1e-6
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"{self.n_heads} heads cannot share {self.n_kv_heads} key heads: {self.n_heads} % {self.n_kv_heads} != 0"
            )
        for name, value, known in (("rope", self.rope, ROPES), ("qk_norm", self.qk_norm, QK_NORMS)):
            if value is not None and value not in known:
                raise ValueError(f"{name} {value!r} is unknown; it is one of {', '.join(known)}, or none")

    @property
    def logit_scale(self) -> float:
        """The factor of the logits."""
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale


@dataclass(frozen=True)
class Matrix:
    """The factors of semiseparable matrices tril(exp(segsum(log_a))) o C B^T + diag(D), one matrix for each teacher head."""

    C: Float[Tensor, "b t h n"]
    B: Float[Tensor, "b t h n"]
    log_a: Float[Tensor, "b t h"]
    D: Float[Tensor, " h"] | None


class Mixer(InPlace, nn.Module):
    """Base of all mixers.

    Subclasses implement the methods that raise NotImplementedError here, except those that their flags exclude. `__init__`
    takes the `Shape`, and the options of a layout as keyword-only arguments. The attributes below describe a mixer to other
    modules; for a composed mixer the attributes of its parts count too.
    """

    orientable: bool = False  # whether `semiseparable` exists, so that `orient` can fit it
    has_decay: bool = False  # whether `set_half_lives` exists
    per_channel: bool = False  # whether each channel of a head has its own matrix; `matrix` gives their mean
    lends: ClassVar[bool] = False  # whether its parts have q, k and v, which a window branch can borrow
    only_attention: ClassVar[bool] = False  # whether it is softmax attention alone
    composed: ClassVar[bool] = False  # whether it is made of other mixers, whose methods it calls
    shares: ClassVar[bool] = False  # whether layers of one letter share parameters (`tie`)
    ignores: ClassVar[frozenset[str]] = frozenset()  # fields of `Projections` that it cannot use
    copied: ClassVar[tuple[str, ...]] = ()  # name prefixes of parameters copied from attention
    copied_role: ClassVar[str] = "ssm"  # the role of the copied parameters, see `roles`
    float32: ClassVar[frozenset[str]] = frozenset()  # names of parameters, buffers or modules that stay in float32
    zero_options: ClassVar[frozenset[str]] = frozenset()  # number options that may be 0; others are 1 or more
    largest_options: ClassVar[dict[str, int]] = {"d_conv": 256}  # largest values of options with a limit of their own
    hidden_options: ClassVar[frozenset[str]] = frozenset()  # options for composed mixers alone, not for layouts
    layer_options: ClassVar[frozenset[str]] = frozenset()  # options that a layout may also give layer by layer
    meanings: ClassVar[dict[str, str]] = {}  # what each option means, for the recipe reference
    choices: ClassVar[dict[str, tuple]] = {}  # the allowed values of an option that has few
    min_lag: int = 0  # matrix entries closer to the diagonal belong to another branch
    silenced: frozenset[str] = frozenset()  # branches set to zero, see `silence`
    horizon: int = 0  # length at which a state that stores tokens is full; 0 if it stores none or all

    def project(self, h: Float[Tensor, "b t d"], context: Context) -> Any:
        """The inputs of the exchange between tokens: a frozen dataclass with a field `values` [b s k p]."""
        raise NotImplementedError

    def mix(self, parts: Any, context: Context) -> Float[Tensor, "b t k p"]:
        """The exchange between tokens, linear in `parts.values`; reads and writes `context.state` if there is one."""
        raise NotImplementedError

    def features(self, y: Float[Tensor, "b t k p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t k p"]:
        """The input of the output projection: y after gates, norms and scales."""
        raise NotImplementedError

    def out_weight(self) -> tuple[Float[Tensor, "k d p"], Float[Tensor, " d"] | None]:
        """The output projection, one matrix for each term, and its bias."""
        raise NotImplementedError

    def out(self, features: Float[Tensor, "b t k p"]) -> Float[Tensor, "b t d"]:
        """The output projection of `features`, by a call of the layer, so that adapters and offloading take part."""
        raise NotImplementedError

    def output(self, y: Float[Tensor, "b t k p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The mixer's output, at the model's width, from the mixed terms."""
        return self.out(self._heard(self.features(y, h)))

    def _heard(self, features: Float[Tensor, "b t k p"]) -> Float[Tensor, "b t k p"]:
        """The features with those of silenced branches set to zero."""
        if self.silenced:
            features = features.clone()
            for name in self.silenced:
                features[:, :, self.branch_terms()[name]] = 0.0
        return features

    def branch_terms(self) -> dict[str, slice]:
        """The terms of each branch of a composed mixer, by name ("ssm" for the state's); empty for a single branch."""
        return {}

    def silence(self, branches: Iterable[str]) -> None:
        """Set the outputs of these branches to zero, for ablations; projections that they share stay with the others.

        Raises:
            ValueError: naming a branch that the mixer does not have.
        """
        self.silenced, known = frozenset(branches), list(self.branch_terms())
        if unknown := sorted(self.silenced.difference(known)):
            raise ValueError(f"{type(self).__name__} has no branch {unknown[0]!r}; there are {', '.join(known) or 'none'}")

    def forward(self, h: Float[Tensor, "b t d"], context: Context | None = None) -> Float[Tensor, "b t d"]:
        """The whole mixer. With a state in the context, h are the next tokens of a sequence that the state has begun."""
        context = context or Context()
        if context.turn is not None:
            return self.token(Entering(h), context)
        with loaded(self._branches()):
            out = self.output(self.mix(self.project(h, context), context), h)
        if context.state is not None:
            cast(MixerState, context.state).advance(h.shape[1], context.documents)
        return out

    def _branches(self) -> list["Mixer"]:
        """The mixers that this one is composed of; none of them is called as a module."""
        if not self.composed:
            return []
        inside = [child for child in self.children() if isinstance(child, Mixer)]
        return inside + [part for child in inside for part in child._branches()]

    def step(self, h: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        """The output for one token (t = 1), with a state.

        Raises:
            ValueError: more than one token, or no state.
        """
        if h.shape[1] != 1 or context.state is None:
            raise ValueError(f"step takes one token and a state; got {h.shape[1]} tokens, state {context.state}")
        return self(h, context)

    def matrix(self, parts: Any) -> Float[Tensor, "b k t t"]:
        """The matrix of each term, computed by `mix` of blocks of the identity's columns, for pictures and tests.

        Where each channel has its own matrix, the mean over a term's channels, computed column by column.
        """
        batch, time, terms, width = parts.values.shape
        identity = torch.eye(time, dtype=parts.values.dtype, device=parts.values.device)
        columns, (block, each) = [], (1, width) if self.per_channel else (MATRIX_BLOCK, -1)
        for start in range(0, time, block):
            values = identity[None, :, None, start : start + block].expand(batch, -1, terms, each)
            y = self.mix(replace(parts, values=values), Context(documents=parts.documents))
            columns.append(y.mean(-1, keepdim=True) if self.per_channel else y)
        return torch.cat(columns, -1).transpose(1, 2)

    def semiseparable(self, parts: Any) -> Matrix:
        """The factors of the matrix, for `orient`; only where `orientable`."""
        raise NotImplementedError(f"{type(self).__name__} has no semiseparable form")

    def oriented(self) -> list[int]:
        """The attention heads whose matrices `semiseparable` gives, in its order; by default all."""
        return list(range(len(self.head_terms())))

    def from_attention(self, attention: Projections) -> Transfer:
        """Set every parameter and buffer from an attention layer's projections; returns the record of their sources."""
        raise NotImplementedError

    @classmethod
    def from_attentions(cls, sites: Sequence["Mixer"], attentions: Sequence[Projections]) -> list[Transfer]:
        """Set mixers that share parameters, each from the attention of its own layer."""
        return [site.from_attention(attention) for site, attention in zip(sites, attentions, strict=True)]

    def tie(self, owner: "Mixer") -> None:
        """Use the shared parameters of another layer's mixer from now on; only where `shares`.

        The owner keeps them as its own, so they are saved, counted and trained once.
        """
        raise NotImplementedError(f"{type(self).__name__} shares nothing between layers")

    def match_norms(
        self, h: Float[Tensor, "b t d"], q: Float[Tensor, "b t h p"], k: Float[Tensor, "b t kv p"], transfer: Transfer
    ) -> None:
        """Give the mixer's counterparts of q and k the mean size that attention's norms give q and k; by default nothing."""

    def calibrate(self, h: Float[Tensor, "b t d"], transfer: Transfer) -> None:
        """Set, in closed form, the parameters that depend on real inputs; by default nothing."""

    def memory_range(self) -> tuple[float, float]:
        """The shortest and the longest initial half-life of its heads, in tokens; only where `has_decay`."""
        raise NotImplementedError(f"{type(self).__name__} has no decay")

    def set_half_lives(self, tokens: Float[Tensor, " h"]) -> None:
        """Set each head's decay so that its memory halves in `tokens` tokens; only where `has_decay`."""
        raise NotImplementedError(f"{type(self).__name__} has no decay")

    def head_terms(self) -> list[list[int]]:
        """For each attention head, the terms that replace it: an SSM's first, then a window's."""
        raise NotImplementedError

    def rescale(self, factors: Float[Tensor, " k"]) -> None:
        """Multiply each term of the output by a factor."""
        raise NotImplementedError

    def roles(self) -> dict[str, str]:
        """The role of each parameter, by name; recipes set learning rates by role.

        "ssm" and "window" are projections copied from attention; "new" are parameters that attention does not have.
        """
        return {name: self.copied_role if name.startswith(self.copied) else "new" for name, _ in self.named_parameters()}
