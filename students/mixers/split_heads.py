"""Attention in some heads of a layer, SSM heads in place of the others (retrieval-aware distillation, arXiv 2602.11374).

    out = sum over kept heads of attention_h + sum over the others of SSM_h

A few heads of a Transformer retrieve distant tokens exactly, which a state-space head cannot do. The paper finds these heads
by ablation on key-value retrieval, keeps them, and turns every other head into discrete Mamba-2. Both branches are made from
the same q, k, v and o, head by head. Query head h reads key head h // (heads / key heads). Kept heads share one copy of each
key head that they read, and every SSM head has its own copy.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from students.kernels.heads import qk_norm
from students.mixers import check_options, has_own_window, make_mixer
from students.mixers.attention import Attention
from students.mixers.entering import Entering, Entry
from students.mixers.mixer import Context, Matrix, Mixer, Shape
from students.mixers.starts import SSM
from students.mixers.transfer import Projections, Transfer
from students.shapes import Float, Int


@dataclass(frozen=True)
class SplitParts:
    """The parts of each branch; `values` are those of the kept heads, then the SSM's."""

    values: Float[Tensor, "b t k p"]
    branches: dict[str, Any]
    documents: Int[Tensor, "b t"] | None


class SplitHeads(Mixer):
    """Attention in some heads, an SSM in the others.

    Raises:
        ValueError: `keep` names heads that do not exist, a head twice or all heads, or `ssm` is not an SSM mixer.
    """

    composed = True
    zero_options = frozenset({"sinks"})
    layer_options = frozenset({"keep"})
    meanings = {name: Attention.meanings[name] for name in ("window", "sinks")} | {
        "keep": "Heads that stay attention, counted from 0, in every layer of this letter, or layer by layer: "
        "`{3: [0, 5], 7: [2], default: []}`. `by: retrieval-heads` selects them.",
        "ssm": "The mixer of the other heads and its options. Default: `{mixer: discrete_mamba2}`.",
    }

    def __init__(
        self,
        shape: Shape,
        *,
        keep: list | None = None,
        window: int | None = None,
        sinks: int = 0,
        ssm: dict | None = None,
    ) -> None:
        super().__init__()
        kept = _checked(keep or [], shape.n_heads)
        rest = [head for head in range(shape.n_heads) if head not in kept]
        group = shape.n_heads // shape.n_kv_heads
        read = sorted({head // group for head in kept})
        self.n_heads = shape.n_heads
        self.heads = {"attention": kept, "ssm": rest}
        self.key_heads = {"attention": read, "ssm": [head // group for head in rest]}
        self.attention: Attention | None = None
        if kept:
            part = replace(shape, n_heads=len(kept), n_kv_heads=len(kept))
            reads = [read.index(head // group) for head in kept]
            self.attention = Attention(part, window=window, sinks=sinks, reads=reads)
        part = replace(shape, n_heads=len(rest), n_kv_heads=len(rest), o_bias=shape.o_bias and not kept)
        self.ssm = _make_ssm(dict(SSM if ssm is None else ssm), part)
        self.orientable, self.has_decay, self.min_lag = self.ssm.orientable, self.ssm.has_decay, self.ssm.min_lag
        self.per_channel = self.ssm.per_channel
        self.terms = [len(branch.out_weight()[0]) for branch in self.branches.values()]

    @property
    def branches(self) -> dict[str, Mixer]:
        """The branches by name; without kept heads the SSM alone."""
        return {"ssm": self.ssm} if self.attention is None else {"attention": self.attention, "ssm": self.ssm}

    def project(self, h: Float[Tensor, "b t d"], context: Context) -> SplitParts:
        parts = {name: branch.project(h, context.scope(name)) for name, branch in self.branches.items()}
        values = torch.cat([part.values[:, -h.shape[1] :] for part in parts.values()], 2)
        return SplitParts(values, parts, context.documents)

    def mix(self, parts: SplitParts, context: Context) -> Float[Tensor, "b t k p"]:
        outputs = []
        for (name, branch), values in zip(self.branches.items(), parts.values.split(self.terms, 2), strict=True):
            part = parts.branches[name]
            earlier = part.values[:, : -values.shape[1]]  # values of cached tokens; an SSM's state has none
            values = torch.cat([earlier, values], 1) if earlier.shape[1] else values
            outputs.append(branch.mix(replace(part, values=values), context.scope(name)))
        return torch.cat([output.to(outputs[-1].dtype) for output in outputs], 2)

    def features(self, y: Float[Tensor, "b t k p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t k p"]:
        terms = zip(self.branches.values(), y.split(self.terms, 2), strict=True)
        return torch.cat([branch.features(part, h) for branch, part in terms], 2)

    def entries(self) -> list[Entry]:
        return [entry for branch in self.branches.values() for entry in branch.entries()]

    def token_features(self, entering: Entering, context: Context) -> Float[Tensor, "b 1 k p"]:
        branches = self.branches.items()
        found = [branch.token_features(entering, context.scope(name)) for name, branch in branches]
        return torch.cat([part.to(found[-1].dtype) for part in found], 2)

    def token_out(
        self, features: Float[Tensor, "b 1 k p"], residual: Float[Tensor, "b 1 d"] | None
    ) -> Float[Tensor, "b 1 d"]:
        for branch, part in zip(self.branches.values(), features.split(self.terms, 2), strict=True):
            residual = branch.token_out(part, residual)
        return cast(Tensor, residual)

    def out_weight(self) -> tuple[Float[Tensor, "k d p"], Float[Tensor, " d"] | None]:
        found = [branch.out_weight() for branch in self.branches.values()]
        biases = [bias for _, bias in found if bias is not None]
        return torch.cat([weight for weight, _ in found]), cast(Tensor, sum(biases)) if biases else None

    def out(self, features: Float[Tensor, "b t k p"]) -> Float[Tensor, "b t d"]:
        terms = zip(self.branches.values(), features.split(self.terms, 2), strict=True)
        return cast(Tensor, sum(branch.out(part) for branch, part in terms))

    def matrix(self, parts: SplitParts) -> Float[Tensor, "b k t t"]:
        return torch.cat([branch.matrix(parts.branches[name]) for name, branch in self.branches.items()], 1)

    def semiseparable(self, parts: SplitParts) -> Matrix:
        return self.ssm.semiseparable(parts.branches["ssm"])

    def oriented(self) -> list[int]:
        return self.heads["ssm"]

    def from_attention(self, attention: Projections) -> Transfer:
        transfer = Transfer()
        for name, branch in self.branches.items():
            transfer.include(name, branch.from_attention(attention.of_heads(self.heads[name], self.key_heads[name])))
            attention = replace(attention, o_bias=None)  # the first branch adds it for both
        return transfer

    def match_norms(
        self, h: Float[Tensor, "b t d"], q: Float[Tensor, "b t h p"], k: Float[Tensor, "b t kv p"], transfer: Transfer
    ) -> None:
        for name, branch in self.branches.items():
            inner, own_q, own_k = transfer.part(name), q[:, :, self.heads[name]], k[:, :, self.key_heads[name]]
            if name == "attention":
                self._match_wide_norms(h, own_q, own_k, inner)
            branch.match_norms(h, own_q, own_k, inner)
            transfer.include(name, inner)

    @torch.no_grad()
    def _match_wide_norms(self, h, q, k, transfer: Transfer) -> None:
        """Scale the kept heads to the mean size that they had under a norm over all heads: the removed heads are missing in
        the norm now."""
        kept = self.attention
        if kept is None or kept.qk_norm != "rms_wide":
            return
        for name, wanted in (("q", q), ("k", k)):
            weight = getattr(kept, f"{name}_norm")
            found = getattr(kept, f"{name}_proj")(h).unflatten(-1, (-1, kept.head_dim))
            found = qk_norm(found, weight, "rms_wide", kept.qk_norm_eps)
            size, size_wanted = (part.square().sum(-1).mean((0, 1)).sqrt() for part in (found, wanted))
            weight.mul_((size_wanted / size.clamp_min(1e-12))[:, None])
            transfer.add(f"{name}_norm", "scaled to the mean size that heads have under the norm over all heads")

    def calibrate(self, h: Float[Tensor, "b t d"], transfer: Transfer) -> None:
        inner = transfer.part("ssm")
        self.ssm.calibrate(h, inner)
        transfer.include("ssm", inner)

    def memory_range(self) -> tuple[float, float]:
        return self.ssm.memory_range()

    def set_half_lives(self, tokens: Float[Tensor, " h"]) -> None:
        self.ssm.set_half_lives(tokens[self.heads["ssm"]])

    def head_terms(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(self.n_heads)]
        first = 0
        for (name, branch), terms in zip(self.branches.items(), self.terms, strict=True):
            for head, inner in zip(self.heads[name], branch.head_terms(), strict=True):
                found[head] = [first + term for term in inner]
            first += terms
        return found

    def branch_terms(self) -> dict[str, slice]:
        inner, first = self.ssm.branch_terms(), sum(self.terms) - self.terms[-1]
        found = {} if self.attention is None else {"attention": slice(0, first)}
        if not inner:
            return {**found, "ssm": slice(first, sum(self.terms))} if found else {}
        moved = {name: slice(first + terms.start, first + terms.stop) for name, terms in inner.items()}
        return found | {name if name == "ssm" else f"ssm.{name}": terms for name, terms in moved.items()}

    def rescale(self, factors: Float[Tensor, " k"]) -> None:
        for branch, part in zip(self.branches.values(), factors.split(self.terms), strict=True):
            branch.rescale(part)

    def roles(self) -> dict[str, str]:
        branches = self.branches.items()
        return {f"{name}.{key}": role for name, branch in branches for key, role in branch.roles().items()}


def _checked(keep: list, heads: int) -> list[int]:
    """The kept heads in order.

    Raises:
        ValueError: naming the wrong head.
    """
    for head in keep:
        if type(head) is not int or not 0 <= head < heads:
            raise ValueError(f"split_heads: keep names {head!r}; the heads here are 0 to {heads - 1}")
    if len(set(keep)) < len(keep):
        raise ValueError(f"split_heads: keep names a head twice: {keep}")
    if len(keep) == heads:
        raise ValueError(f"split_heads: keep names all {heads} heads; keep such a layer's attention in the pattern instead")
    return sorted(keep)


def _make_ssm(options: dict, shape: Shape) -> Mixer:
    """The SSM branch.

    Raises:
        ValueError: `ssm` is not an SSM mixer, its options are refused, or its terms are not as wide as a head.
    """
    name = options.pop("mixer", None)
    if not isinstance(name, str) or has_own_window(name):
        raise ValueError(f"split_heads: ssm names the mixer {name!r}; write it as ssm: {{mixer: discrete_mamba2}}")
    check_options(name, options, " (ssm of split_heads)")
    mixer = make_mixer(name, shape, options)
    width = mixer.out_weight()[0].shape[-1]
    if width != shape.head_dim:
        raise ValueError(f"split_heads: the terms of {name} are {width} wide, and those of the kept heads {shape.head_dim}")
    return mixer
