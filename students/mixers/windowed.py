"""Any SSM mixer with a window branch beside it: exact attention near, a state for what lies further back.

    out = sum over heads of  s_h SSM_h + w_h window_h

With `lag` the state takes a token only when it leaves the window, and together they see each token once (the sinks
twice). With `gate` a head and token shares out the two, 2 sigmoid(g) to the state and 2 (1 - sigmoid(g)) to the window,
g = W h + b starting at 0.

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
        ssm: the SSM branch. window: the window branch; without projections of its own it uses the SSM's.
        gate: whether each token shares out the two branches, or "select": whether and how much it uses the window.

    Raises:
        ValueError: another gate.
    """

    beside = "window"
    window: Attention
    window_options: ClassVar[dict[str, Any]] = {"size": int, "sinks": int, "own": bool, "lag": bool, "gate": bool | str}
    window_defaults: ClassVar[dict[str, int | bool]] = {"sinks": 4, "own": True, "lag": True, "gate": False}
    zero_options = frozenset({"sinks"})
    choices = {"gate": (True, False, "select")}
    meanings = {
        "size": "Tokens that the window holds. It must be given.",
        "sinks": "First tokens of a document that the window always sees too.",
        "own": "The window has q, k, v and output projections of its own; else it borrows the state's, where the mixer has "
        "such.",
        "lag": "The state takes a token only when it leaves the window. By default where the mixer can.",
        "gate": "Each head and token shares out state and window (`true`), or each token says whether and how much it uses "
        "the window (`select`, as in Taipan).",
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
        """Without a projection of its own, what the window adds goes through that of the head it stands beside."""
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
