"""Any SSM mixer with a window branch beside it: exact attention near, a state for what lies further back.

    out = sum over heads of  s_h SSM_h + w_h window_h

The branches are two linear terms of one mixer, so their matrices add up. With `lag` the state takes a token only when
it leaves the window, and together they see each token once (the sinks twice). With `gate` a head and token shares out
the two, 2 sigmoid(g) to the state and 2 (1 - sigmoid(g)) to the window, g = W h + b starting at 0.

Two systems of the literature are layouts of this mixer.

  - B'MOJO-F (arXiv 2407.06324), a fading memory behind an eidetic one: `{mixer: mamba2, window: {size: 512, sinks: 0}}`. The
    state holds what has left the window, fading, and the window holds the latest tokens as they were. There one softmax
    runs over the window's tokens and the state's outputs together; here the two are added, shared out by `gate` if wanted.
  - Taipan (arXiv 2410.18572), selective attention: `gate: select` with `lag: false`, in some of the layers. A gate finds the
    tokens that need attention on top of what the state says, with the weight max(0, tanh g), one number a token: exactly
    nothing for the others. It starts at tanh 1 for every token. There the attention reads the state-space block's output,
    and its keys too are selected tokens alone; the choice is a sampled one (Gumbel-softmax) under a budget with a loss of
    its own. Here both branches read the layer's input, nothing but the distillation loss moves the gate, and attention is
    computed for every token: it selects what counts, and saves no time.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from students.mixers.attention import Attention, AttentionParts
from students.mixers.mixer import Context, Matrix, Mixer, Transfer
from students.shapes import Float, Int


@dataclass(frozen=True)
class WindowedParts:
    """Both branches' parts; `values` are the state's, then the window's."""

    values: Float[Tensor, "b t k p"]
    ssm: Any
    window: AttentionParts
    documents: Int[Tensor, "b t"] | None


class Windowed(Mixer):
    """An SSM mixer and a sliding window with sinks.

    Args:
        ssm: the SSM branch. window: the window branch; without projections of its own it uses the SSM's.
        gate: whether each token shares out the two branches, or "select": whether and how much it uses the window.

    Raises:
        ValueError: another gate.
    """

    def __init__(self, ssm: Mixer, window: Attention, d_model: int, *, gate: bool | str = False) -> None:
        super().__init__()
        if isinstance(gate, str) and gate != "select":
            raise ValueError(f"the gate of a window is {gate!r}; it is true, false or 'select'")
        self.ssm, self.window = ssm, window
        self.orientable, self.has_decay, self.per_channel = ssm.orientable, ssm.has_decay, ssm.per_channel
        self.min_lag = max(ssm.min_lag, window.window)
        self.share = nn.Linear(d_model, window.n_heads) if gate is True else None
        self.select = nn.Linear(d_model, 1) if gate == "select" else None
        self.own = not window.borrowed

    def project(self, h: Float[Tensor, "b t d"], context: Context) -> WindowedParts:
        ssm = self.ssm.project(h, context.scope("ssm"))
        if self.own:
            window = self.window.project(h, context.scope("window"))
        else:
            window = self.window.arrange(ssm.q, ssm.k, ssm.v, context.scope("window"))
        values = torch.cat([ssm.values, window.values[:, -h.shape[1] :]], 2)
        return WindowedParts(values, ssm, window, context.documents)

    def mix(self, parts: WindowedParts, context: Context) -> Float[Tensor, "b t k p"]:
        ssm_values, window_values = self._halves(parts.values)
        earlier = parts.window.values[:, : -window_values.shape[1]]
        if earlier.shape[1]:
            window_values = torch.cat([earlier, window_values], 1)
        ssm = self.ssm.mix(replace(parts.ssm, values=ssm_values), context.scope("ssm"))
        window = self.window.mix(replace(parts.window, values=window_values), context.scope("window"))
        return torch.cat([ssm, window.to(ssm.dtype)], 2)

    def features(self, y: Float[Tensor, "b t k p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t k p"]:
        ssm, window = self._halves(y)
        ssm, window = self.ssm.features(ssm, h), self.window.features(window, h)
        if self.select is not None:
            window = window * torch.tanh(self.select(h)).relu()[..., None]
        if self.share is not None:
            share = 2 * torch.sigmoid(self.share(h))[..., None]
            window = window * (2 - share)
            ssm = ssm * share.repeat_interleave(ssm.shape[2] // share.shape[2], 2)
        return torch.cat([ssm, window], 2)

    def out_weight(self) -> tuple[Float[Tensor, "k d p"], Float[Tensor, " d"] | None]:
        weight, bias = self.ssm.out_weight()
        if self.own:
            return torch.cat([weight, self.window.out_weight()[0]]), bias
        return torch.cat([weight, weight[:: weight.shape[0] // self.window.n_heads]]), bias

    def matrix(self, parts: WindowedParts) -> Float[Tensor, "b k t t"]:
        return torch.cat([self.ssm.matrix(parts.ssm), self.window.matrix(parts.window)], 1)

    def semiseparable(self, parts: WindowedParts) -> Matrix:
        return self.ssm.semiseparable(parts.ssm)

    def from_attention(
        self, q, k, v, o, q_bias=None, k_bias=None, v_bias=None, o_bias=None, q_norm=None, k_norm=None
    ) -> Transfer:
        transfer, norms = Transfer(), {"q_norm": q_norm, "k_norm": k_norm}
        transfer.include("ssm", self.ssm.from_attention(q, k, v, o, q_bias, k_bias, v_bias, o_bias, **norms))
        transfer.include("window", self.window.from_attention(q, k, v, o, q_bias, k_bias, v_bias, **norms))
        if self.share is not None:
            nn.init.zeros_(self.share.weight)
            nn.init.zeros_(self.share.bias)
            transfer.set("share.weight", "set to 0, an even share")
            transfer.set("share.bias", "set to 0, an even share")
        if self.select is not None:
            nn.init.zeros_(self.select.weight)
            nn.init.ones_(self.select.bias)
            transfer.set("select.weight", "set to 0, every token the same")
            transfer.set("select.bias", "set to 1, every token selected")
        return transfer

    def match_norms(self, h, q, k, transfer: Transfer) -> None:
        inner = _of_ssm(transfer)
        self.ssm.match_norms(h, q, k, inner)
        transfer.include("ssm", inner)

    def calibrate(self, h: Float[Tensor, "b t d"], transfer: Transfer) -> None:
        inner = _of_ssm(transfer)
        self.ssm.calibrate(h, inner)
        transfer.include("ssm", inner)

    def set_half_lives(self, tokens: Float[Tensor, " h"]) -> None:
        self.ssm.set_half_lives(tokens)

    def head_terms(self) -> list[list[int]]:
        inner = self.ssm.head_terms()
        first = len(self.ssm.out_weight()[0])
        return [[*terms, first + head] for head, terms in enumerate(inner)]

    def rescale(self, factors: Float[Tensor, " k"]) -> None:
        split = len(factors) - self.window.n_heads
        self.ssm.rescale(factors[:split])
        self.window.rescale(factors[split:])

    def roles(self) -> dict[str, str]:
        roles = {f"{name}": "new" for name, _ in self.named_parameters()}
        for prefix, branch in (("ssm", self.ssm), ("window", self.window)):
            roles.update({f"{prefix}.{name}": role for name, role in branch.roles().items()})
        return roles

    def _halves(self, terms: Float[Tensor, "b t k p"]) -> tuple[Tensor, Tensor]:
        """The SSM's terms and the window's."""
        return terms.split([terms.shape[2] - self.window.n_heads, self.window.n_heads], 2)


def _of_ssm(transfer: Transfer) -> Transfer:
    """The part of a record that speaks of the SSM branch, its names as that branch knows them."""
    return Transfer({name[4:]: text for name, text in transfer.sources.items() if name.startswith("ssm.")})
