"""What every token mixer is: the contract that slots, stages, reports and tests rely on.

A mixer maps the slot's input h [b t d] to its output [b t d] in three steps,

    parts = project(h)            everything that depends on single tokens or a few neighbours
    y     = mix(parts)            tokens exchange what they carry; linear in parts.values
    out   = output(y, h)          gates, norms and scales, then the projection back to d

and y [b t k p] holds k terms (heads, of every branch). Because `mix` is linear in the values, it has a matrix per term,
y_k = M_k values_k, which is what a mixer is compared with attention by. Where each channel of a head forgets at its own
rate (`per_channel`) it has a matrix a channel, and pictures show their mean over a head (arXiv 2403.01590).
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
    """The attention that a mixer stands in for: sizes, biases, and what is done to its logits.

    softmax_scale: multiplies the logits (None: 1 / sqrt(head_dim)). softcap: c in c tanh(logits / c). window: tokens that
    a token sees, itself included (None: all). rope: how q and k are rotated, by "half" (channel i with i + r / 2), by
    "pairs" (2 i with 2 i + 1) or not at all. qk_norm: the norm on q and k, "rms" of each head, "rms_wide" of all heads
    together, "layer" of each head with its mean removed, or none; qk_norm_eps: its epsilon. norm_eps: the skeleton's, for
    norms that a mixer adds.
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
        """What multiplies the logits."""
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale


@dataclass(frozen=True)
class Matrix:
    """The pieces of a semiseparable matrix tril(exp(segsum(log_a))) o C B^T + diag(D), one a teacher head."""

    C: Float[Tensor, "b t h n"]
    B: Float[Tensor, "b t h n"]
    log_a: Float[Tensor, "b t h"]
    D: Float[Tensor, " h"] | None


class Mixer(InPlace, nn.Module):
    """Base of all mixers. Subclasses implement what raises NotImplementedError here, but for what their flags exclude.

    The options of a layout are the keyword-only arguments of `__init__`, beside its one argument, the `Shape`. What else
    others ask about a mixer is said by the attributes below; those of a composed mixer's parts count too.
    """

    orientable: bool = False  # whether `semiseparable` exists, so that `orient` can fit it
    has_decay: bool = False  # whether `set_half_lives` exists
    per_channel: bool = False  # whether the channels of a head have a matrix each; `matrix` gives their mean
    lends: ClassVar[bool] = False  # whether its parts hold q, k and v, for a window branch that borrows them
    only_attention: ClassVar[bool] = False  # whether it is softmax attention and nothing beside it
    composed: ClassVar[bool] = False  # whether it is made of other mixers, which it uses part by part
    shares: ClassVar[bool] = False  # whether layers of one letter share parameters (`tie`)
    ignores: ClassVar[frozenset[str]] = frozenset()  # what of attention, by names of `Projections`, it has no place for
    copied: ClassVar[tuple[str, ...]] = ()  # what the names of the parameters begin with that are copied from attention
    copied_role: ClassVar[str] = "ssm"  # the role of these, see `roles`
    float32: ClassVar[frozenset[str]] = frozenset()  # names of parameters, buffers or modules that no cast makes narrower
    zero_options: ClassVar[frozenset[str]] = frozenset()  # numbers among the options that may be 0; the others are 1 or more
    largest_options: ClassVar[dict[str, int]] = {"d_conv": 256}  # the largest values of numbers that others are wider than
    hidden_options: ClassVar[frozenset[str]] = frozenset()  # options for composed mixers alone, which no layout may give
    layer_options: ClassVar[frozenset[str]] = frozenset()  # options that a layout may also give layer by layer
    meanings: ClassVar[dict[str, str]] = {}  # what each option is, for the reference of recipes
    choices: ClassVar[dict[str, tuple]] = {}  # all values of options that may only be one of a few
    min_lag: int = 0  # entries of the matrix nearer to the diagonal belong to another branch
    silenced: frozenset[str] = frozenset()  # branches that add nothing to the output, see `silence`
    horizon: int = 0  # tokens after which a state that keeps single tokens is full; 0 where it keeps none, or all

    def project(self, h: Float[Tensor, "b t d"], context: Context) -> Any:
        """Everything up to the exchange between tokens: a frozen dataclass with a field `values` [b s k p]."""
        raise NotImplementedError

    def mix(self, parts: Any, context: Context) -> Float[Tensor, "b t k p"]:
        """The exchange between tokens, linear in `parts.values`; reads and writes `context.state` if there is one."""
        raise NotImplementedError

    def features(self, y: Float[Tensor, "b t k p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t k p"]:
        """Gates, norms and scales: what the output projection sees."""
        raise NotImplementedError

    def out_weight(self) -> tuple[Float[Tensor, "k d p"], Float[Tensor, " d"] | None]:
        """The output projection, a matrix a term, and its bias."""
        raise NotImplementedError

    def out(self, features: Float[Tensor, "b t k p"]) -> Float[Tensor, "b t d"]:
        """The output projection applied: called, never its weight read, which adapters and offloading stand around."""
        raise NotImplementedError

    def output(self, y: Float[Tensor, "b t k p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """From the mixed terms back to the model's width."""
        return self.out(self._heard(self.features(y, h)))

    def _heard(self, features: Float[Tensor, "b t k p"]) -> Float[Tensor, "b t k p"]:
        """Without what silenced branches add."""
        if self.silenced:
            features = features.clone()
            for name in self.silenced:
                features[:, :, self.branch_terms()[name]] = 0.0
        return features

    def branch_terms(self) -> dict[str, slice]:
        """The terms of each branch of a composed mixer, by name; the state's is called "ssm". Empty of one branch alone."""
        return {}

    def silence(self, branches: Iterable[str]) -> None:
        """Let these branches add nothing to the output, for knock-outs; what they share stays with the others. A ValueError
        names the branch that is not there."""
        self.silenced, known = frozenset(branches), list(self.branch_terms())
        if unknown := sorted(self.silenced.difference(known)):
            raise ValueError(f"{type(self).__name__} has no branch {unknown[0]!r}; there are {', '.join(known) or 'none'}")

    def forward(self, h: Float[Tensor, "b t d"], context: Context | None = None) -> Float[Tensor, "b t d"]:
        """The whole mixer; with a state in the context, the next tokens of a text whose earlier tokens it has seen."""
        context = context or Context()
        if context.turn is not None:
            return self.token(Entering(h), context)
        with loaded(self._branches()):
            out = self.output(self.mix(self.project(h, context), context), h)
        if context.state is not None:
            cast(MixerState, context.state).advance(h.shape[1], context.documents)
        return out

    def _branches(self) -> list["Mixer"]:
        """The mixers that this one is composed of, which nobody calls as modules."""
        if not self.composed:
            return []
        inside = [child for child in self.children() if isinstance(child, Mixer)]
        return inside + [part for child in inside for part in child._branches()]

    def step(self, h: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        """One token on a state (t = 1).

        Raises:
            ValueError: more than one token, or no state.
        """
        if h.shape[1] != 1 or context.state is None:
            raise ValueError(f"step takes one token and a state; got {h.shape[1]} tokens, state {context.state}")
        return self(h, context)

    def matrix(self, parts: Any) -> Float[Tensor, "b k t t"]:
        """The matrix of each term, by sending blocks of the identity's columns through `mix`. For pictures and tests.

        Where channels have a matrix each, the mean over a term's channels, one column of all channels at a time.
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
        """The matrix in pieces, for `orient`; only where `orientable`."""
        raise NotImplementedError(f"{type(self).__name__} has no semiseparable form")

    def oriented(self) -> list[int]:
        """The attention heads whose matrices `semiseparable` gives, in its order; all of them unless a mixer says less."""
        return list(range(len(self.head_terms())))

    def from_attention(self, attention: Projections) -> Transfer:
        """Set every parameter and buffer from an attention layer's projections, and say how."""
        raise NotImplementedError

    @classmethod
    def from_attentions(cls, sites: Sequence["Mixer"], attentions: Sequence[Projections]) -> list[Transfer]:
        """Set mixers that share parameters, each from the attention of its own layer."""
        return [site.from_attention(attention) for site, attention in zip(sites, attentions, strict=True)]

    def tie(self, owner: "Mixer") -> None:
        """Use, from now on, the parameters of another layer's mixer that all its layers have in common: they stay that
        one's own, so that they are saved, counted and trained once. Only where `shares`."""
        raise NotImplementedError(f"{type(self).__name__} shares nothing between layers")

    def match_norms(
        self, h: Float[Tensor, "b t d"], q: Float[Tensor, "b t h p"], k: Float[Tensor, "b t kv p"], transfer: Transfer
    ) -> None:
        """Where attention normalises q and k and the mixer does not: give its own the size of these; by default nothing."""

    def calibrate(self, h: Float[Tensor, "b t d"], transfer: Transfer) -> None:
        """Set what can only be known from real inputs in closed form; by default nothing."""

    def memory_range(self) -> tuple[float, float]:
        """Half-lives in tokens, the shortest and the longest that its heads begin with; only where `has_decay`."""
        raise NotImplementedError(f"{type(self).__name__} has no decay")

    def set_half_lives(self, tokens: Float[Tensor, " h"]) -> None:
        """Set every attention head's decay to halve its memory in so many tokens; only where `has_decay`."""
        raise NotImplementedError(f"{type(self).__name__} has no decay")

    def head_terms(self) -> list[list[int]]:
        """For each attention head, the terms that stand in for it: an SSM's first, then a window's."""
        raise NotImplementedError

    def rescale(self, factors: Float[Tensor, " k"]) -> None:
        """Multiply each term of the output by a factor."""
        raise NotImplementedError

    def roles(self) -> dict[str, str]:
        """Each parameter's role, which learning rates are given by: "ssm" and "window" are projections copied from
        attention, "new" is everything attention does not have."""
        return {name: self.copied_role if name.startswith(self.copied) else "new" for name, _ in self.named_parameters()}
