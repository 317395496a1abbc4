"""An SSM mixer with a window branch: exact attention to the latest tokens, and a state for older ones.

    out = sum over heads of  s_h SSM_h + w_h window_h

With `lag` the state takes a token only when the token leaves the window, so the two branches together see each token once
(the sinks twice). With `gate` each head and token weighs the branches: the state by 2 sigmoid(g) and the window by
2 (1 - sigmoid(g)), where g = W h + b starts at 0.

Two published systems are layouts of this mixer:

  - B'MOJO-F (arXiv 2407.06324) combines a fading memory (the state) with an eidetic one (the window):
    `{mixer: mamba2, window: {size: 512, sinks: 0}}`. In the paper one softmax runs over the window's tokens and the state's
    outputs together. Here the outputs of the branches are added, with weights from `gate` if it is set.
  - Taipan (arXiv 2410.18572) has selective attention in some of the layers: `gate: select` with `lag: false`. The gate
    selects tokens that need attention in addition to the state. The window's weight is max(0, tanh g), one number a token;
    it is exactly 0 for tokens that are not selected, and starts at tanh 1 for every token. In the paper the attention reads
    the output of the state-space block, its keys are selected tokens alone, and the selection is sampled (Gumbel-softmax)
    under a budget with its own loss. Here both branches read the layer's input, and the gate is trained by the distillation
    loss alone. Attention is computed for every token, so selection saves no time.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from students.mixers.attention import Attention, AttentionParts
from students.mixers.branches import Branches
from students.mixers.entering import Entering, Entry
from students.mixers.mixer import Context, Mixer
from students.mixers.state_space import StateSpace
from students.mixers.transfer import Projections, Transfer
from students.shapes import Float


class Windowed(Branches):
    """An SSM mixer and a sliding window with sinks.

    Args:
        ssm: the SSM branch. window: the window branch, with its own projections or the SSM's.
        gate: whether each head and token weighs the two branches; "select": each token weighs the window alone.

    Raises:
        ValueError: an unknown gate.
    """

    beside = "window"
    window: Attention
    window_options: ClassVar[dict[str, Any]] = {"size": int, "sinks": int, "own": bool, "lag": bool, "gate": bool | str}
    window_defaults: ClassVar[dict[str, int | bool]] = {"sinks": 4, "own": True, "lag": True, "gate": False}
    zero_options = frozenset({"sinks"})
    choices = {"gate": (True, False, "select")}
    meanings = {
        "size": "Number of tokens in the window. Required.",
        "sinks": "Number of first tokens of a document that the window always sees too.",
        "own": "The window has its own q, k, v and output projections. Otherwise it borrows the SSM's, if the mixer has "
        "them.",
        "lag": "The state takes a token only when that token leaves the window. Default: true if the mixer has a lag.",
        "gate": "`true`: each head and token weighs state and window. `select`: each token weighs the window alone, as in "
        "Taipan.",
    }

    def __init__(self, ssm: Mixer, window: Attention, d_model: int, *, gate: bool | str = False) -> None:
        super().__init__(ssm, window)
        if isinstance(gate, str) and gate != "select":
            raise ValueError(f"the gate of a window is {gate!r}; it is true, false or 'select'")
        self.min_lag = max(ssm.min_lag, cast(int, window.window))
        self.share = nn.Linear(d_model, window.n_heads) if gate is True else None
        self.select = nn.Linear(d_model, 1) if gate == "select" else None
        self.own = not window.borrowed

    def attend(self, h: Float[Tensor, "b t d"], ssm: Any, context: Context) -> AttentionParts:
        return super().attend(h, ssm, context) if self.own else self.window.arrange(ssm.q, ssm.k, ssm.v, context)

    @property
    def joins(self) -> bool:
        if self.share is not None and not isinstance(self.ssm, StateSpace):
            return True
        return not self.own or self.select is not None

    def entries(self) -> list[Entry]:
        return super().entries() if self.share is None or self.joins else [*super().entries(), Entry(self.share)]

    def token_apart(self, entering: Entering, context: Context) -> tuple[Float[Tensor, "b 1 k p"], Float[Tensor, "b 1 h p"]]:
        if self.share is None:
            return super().token_apart(entering, context)
        share = entering(Entry(self.share))[:, 0]
        window = self.window.token_features(entering, context.scope(self.beside), share)
        return cast(StateSpace, self.ssm).token_features(entering, context.scope("ssm"), share), window

    def token_attention(self, entering: Entering, context: Context) -> Float[Tensor, "b 1 h p"]:
        if self.own:
            return super().token_attention(entering, context)
        q, k, v = cast(StateSpace, self.ssm).lent(entering)
        return self.window.token_attend(q, k, v, entering.x.dtype, context.scope(self.beside))

    def token_out(
        self, features: Float[Tensor, "b 1 k p"], residual: Float[Tensor, "b 1 d"] | None
    ) -> Float[Tensor, "b 1 d"]:
        return super().token_out(features, residual) if self.own else Mixer.token_out(self, features, residual)

    def joined(self, features: Float[Tensor, "b t k p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t k p"]:
        if self.share is None and self.select is None:
            return features
        ssm, window = self.split(features)
        if self.select is not None:
            window = window * torch.tanh(self.select(h)).relu()[..., None]
        if self.share is not None:
            share = 2 * torch.sigmoid(self.share(h))[..., None]
            window = window * (2 - share)
            ssm = ssm * share.repeat_interleave(ssm.shape[2] // share.shape[2], 2)
        return torch.cat([ssm, window], 2)

    def out_weight(self) -> tuple[Float[Tensor, "k d p"], Float[Tensor, " d"] | None]:
        if self.own:
            return super().out_weight()
        weight, bias = self.ssm.out_weight()
        return torch.cat([weight, weight[:: weight.shape[0] // self.window.n_heads]]), bias

    def out(self, features: Float[Tensor, "b t k p"]) -> Float[Tensor, "b t d"]:
        """The output projection; a window without its own uses that of the SSM head for the same attention head."""
        if self.own:
            return super().out(features)
        ssm, window = self.split(features)
        apart = ssm.unflatten(2, (self.window.n_heads, -1))
        first = apart[:, :, :, :1] + window[:, :, :, None]
        return self.ssm.out(torch.cat([first, apart[:, :, :, 1:]], 3).flatten(2, 3))

    def from_attention(self, attention: Projections) -> Transfer:
        transfer = super().from_attention(attention)
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
