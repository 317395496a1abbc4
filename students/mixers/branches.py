"""Base of mixers that add the outputs of an SSM and of softmax attention on the same input.

In `values`, y and the output projection the SSM's terms come first, then one term for each attention head.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from students.mixers.attention import Attention, AttentionParts
from students.mixers.derived import derived, given
from students.mixers.entering import Entering, Entry
from students.mixers.mixer import Context, Matrix, Mixer
from students.mixers.transfer import Projections, Transfer
from students.shapes import Float, Int
from students.wrapped import loaded


def _joined(parts: "BranchesParts") -> Float[Tensor, "b t k p"]:
    return torch.cat([parts.ssm.values, parts.attention.every[:, -parts.attention.q.shape[1] :]], 2)


@dataclass(frozen=True)
class BranchesParts:
    """The parts of both branches; `values` are the SSM's, then those of the attention's new tokens."""

    ssm: Any
    attention: AttentionParts
    documents: Int[Tensor, "b t"] | None
    values: Float[Tensor, "b t k p"] | None = derived(_joined)  # noqa: RUF009 - a descriptor


class Branches(Mixer):
    """Base of mixers with an SSM branch and an attention branch, made from the same projections.

    `beside`: the attention's name in names of parameters and of the state.
    """

    beside: ClassVar[str]
    composed = True

    def __init__(self, ssm: Mixer, attention: Attention) -> None:
        super().__init__()
        self.ssm = ssm
        setattr(self, self.beside, attention)
        self.orientable, self.has_decay, self.per_channel = ssm.orientable, ssm.has_decay, ssm.per_channel
        self.min_lag = ssm.min_lag

    @property
    def exact(self) -> Attention:
        """The attention branch."""
        return getattr(self, self.beside)

    def project(self, h: Float[Tensor, "b t d"], context: Context) -> BranchesParts:
        ssm = self.ssm.project(h, context.scope("ssm"))
        attention = self.attend(h, ssm, context.scope(self.beside))
        return BranchesParts(ssm, attention, context.documents)

    def attend(self, h: Float[Tensor, "b t d"], ssm: Any, context: Context) -> AttentionParts:
        """The attention's parts; `ssm` are the SSM's."""
        return self.exact.project(h, context)

    def mix(self, parts: BranchesParts, context: Context) -> Float[Tensor, "b t k p"]:
        ssm, attention = parts.ssm, parts.attention
        if given(parts, "values") is not None:
            ssm_values, values = self.split(cast(Tensor, parts.values))
            earlier = attention.every[:, : -values.shape[1]]
            values = torch.cat([earlier, values], 1) if earlier.shape[1] else values
            ssm, attention = replace(ssm, values=ssm_values), replace(attention, values=values)
        mixed = self.ssm.mix(ssm, context.scope("ssm"))
        exact = self.exact.mix(attention, context.scope(self.beside))
        return torch.cat([mixed, exact.to(mixed.dtype)], 2)

    def features(self, y: Float[Tensor, "b t k p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t k p"]:
        ssm, attention = self.split(y)
        return self.joined(torch.cat([self.ssm.features(ssm, h), self.exact.features(attention, h)], 2), h)

    @property
    def joins(self) -> bool:
        """Whether `joined` does more than `token_apart`, so that one token needs `joined`."""
        return False

    def joined(self, features: Float[Tensor, "b t k p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t k p"]:
        """The features of both branches after a joint operation, such as a gate or a norm; unchanged by default."""
        return features

    def entries(self) -> list[Entry]:
        return [*self.ssm.entries(), *self.exact.entries()]

    def token(
        self, entering: Entering, context: Context, residual: Float[Tensor, "b 1 d"] | None = None
    ) -> Float[Tensor, "b 1 d"]:
        """As `InPlace.token`, without a concatenation of the branches where `joins` is false."""
        if self.joins or self.silenced:
            return super().token(entering, context, residual)
        with loaded(self._branches()):
            entering.prime(self.entries())
            ssm, attention = self.token_apart(entering, context)
            return self.ssm.token_out(ssm, self.exact.token_out(attention, residual))

    def token_apart(self, entering: Entering, context: Context) -> tuple[Float[Tensor, "b 1 k p"], Float[Tensor, "b 1 h p"]]:
        """The SSM's and the attention's features of one token, as separate tensors, with the changes of `joined` applied."""
        return self.token_branches(entering, context)

    def token_branches(
        self, entering: Entering, context: Context
    ) -> tuple[Float[Tensor, "b 1 k p"], Float[Tensor, "b 1 h p"]]:
        """As `token_apart`, without the changes of `joined`."""
        attention = self.token_attention(entering, context)
        return self.ssm.token_features(entering, context.scope("ssm")), attention

    def token_features(self, entering: Entering, context: Context) -> Float[Tensor, "b 1 k p"]:
        ssm, attention = self.token_branches(entering, context)
        return self.joined(torch.cat([ssm, attention.to(ssm.dtype)], 2), entering.h)

    def token_attention(self, entering: Entering, context: Context) -> Float[Tensor, "b 1 h p"]:
        """The attention's features of one token on a held state."""
        return self.exact.token_features(entering, context.scope(self.beside))

    def token_out(
        self, features: Float[Tensor, "b 1 k p"], residual: Float[Tensor, "b 1 d"] | None
    ) -> Float[Tensor, "b 1 d"]:
        ssm, beside = self.split(features)
        return self.ssm.token_out(ssm, self.exact.token_out(beside, residual))

    def out_weight(self) -> tuple[Float[Tensor, "k d p"], Float[Tensor, " d"] | None]:
        weight, bias = self.ssm.out_weight()
        return torch.cat([weight, self.exact.out_weight()[0]]), bias

    def out(self, features: Float[Tensor, "b t k p"]) -> Float[Tensor, "b t d"]:
        """The sum of both branches' output projections; one joint product would need a copy of both weights."""
        ssm, beside = self.split(features)
        return self.ssm.out(ssm) + self.exact.out(beside)

    def matrix(self, parts: BranchesParts) -> Float[Tensor, "b k t t"]:
        return torch.cat([self.ssm.matrix(parts.ssm), self.exact.matrix(parts.attention)], 1)

    def semiseparable(self, parts: BranchesParts) -> Matrix:
        return self.ssm.semiseparable(parts.ssm)

    def from_attention(self, attention: Projections) -> Transfer:
        transfer = Transfer()
        transfer.include("ssm", self.ssm.from_attention(attention))
        transfer.include(self.beside, self.exact.from_attention(replace(attention, o_bias=None)))
        return transfer

    def match_norms(
        self, h: Float[Tensor, "b t d"], q: Float[Tensor, "b t h p"], k: Float[Tensor, "b t kv p"], transfer: Transfer
    ) -> None:
        inner = transfer.part("ssm")
        self.ssm.match_norms(h, q, k, inner)
        transfer.include("ssm", inner)

    def calibrate(self, h: Float[Tensor, "b t d"], transfer: Transfer) -> None:
        inner = transfer.part("ssm")
        self.ssm.calibrate(h, inner)
        transfer.include("ssm", inner)

    def memory_range(self) -> tuple[float, float]:
        return self.ssm.memory_range()

    def set_half_lives(self, tokens: Float[Tensor, " h"]) -> None:
        self.ssm.set_half_lives(tokens)

    def head_terms(self) -> list[list[int]]:
        first = len(self.ssm.out_weight()[0])
        return [[*terms, first + head] for head, terms in enumerate(self.ssm.head_terms())]

    def rescale(self, factors: Float[Tensor, " k"]) -> None:
        split = len(factors) - self.exact.n_heads
        self.ssm.rescale(factors[:split])
        self.exact.rescale(factors[split:])

    def roles(self) -> dict[str, str]:
        roles = super().roles()
        for prefix, branch in (("ssm", self.ssm), (self.beside, self.exact)):
            roles.update({f"{prefix}.{name}": role for name, role in branch.roles().items()})
        return roles

    def branch_terms(self) -> dict[str, slice]:
        terms = len(self.out_weight()[0])
        border = terms - self.exact.n_heads
        return {"ssm": slice(0, border), self.beside: slice(border, terms)}

    def split(self, terms: Float[Tensor, "b t k p"]) -> tuple[Tensor, Tensor]:
        """The SSM's terms and the attention's."""
        return terms.split([terms.shape[2] - self.exact.n_heads, self.exact.n_heads], 2)
