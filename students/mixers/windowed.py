"""Any SSM mixer with a window branch beside it: exact attention near, a state for what lies further back.

    out = sum over heads of  s_h SSM_h + w_h window_h

With `lag` the state takes a token only when it leaves the window, and together they see each token once (the sinks
twice). With `gate` a head and token shares out the two, 2 sigmoid(g) to the state and 2 (1 - sigmoid(g)) to the window,
g = W h + b starting at 0.
"""

from typing import Any

import torch
from torch import Tensor, nn

from students.mixers.attention import Attention, AttentionParts
from students.mixers.branches import Branches
from students.mixers.mixer import Context, Mixer, Transfer
from students.shapes import Float


class Windowed(Branches):
    """An SSM mixer and a sliding window with sinks.

    Args:
        ssm: the SSM branch. window: the window branch; without projections of its own it uses the SSM's.
        gate: whether each token shares out the two branches.
    """

    beside = "window"

    def __init__(self, ssm: Mixer, window: Attention, d_model: int, *, gate: bool = False) -> None:
        super().__init__(ssm, window)
        self.min_lag = max(ssm.min_lag, window.window)
        self.share = nn.Linear(d_model, window.n_heads) if gate else None
        self.own = not window.borrowed

    def attend(self, h: Float[Tensor, "b t d"], ssm: Any, context: Context) -> AttentionParts:
        return super().attend(h, ssm, context) if self.own else self.window.arrange(ssm.q, ssm.k, ssm.v, context)

    def features(self, y: Float[Tensor, "b t k p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t k p"]:
        features = super().features(y, h)
        if self.share is None:
            return features
        ssm, window = self.split(features)
        share = 2 * torch.sigmoid(self.share(h))[..., None]
        return torch.cat([ssm * share.repeat_interleave(ssm.shape[2] // share.shape[2], 2), window * (2 - share)], 2)

    def out_weight(self) -> tuple[Float[Tensor, "k d p"], Float[Tensor, " d"] | None]:
        if self.own:
            return super().out_weight()
        weight, bias = self.ssm.out_weight()
        return torch.cat([weight, weight[:: weight.shape[0] // self.window.n_heads]]), bias

    def from_attention(
        self, q, k, v, o, q_bias=None, k_bias=None, v_bias=None, o_bias=None, q_norm=None, k_norm=None
    ) -> Transfer:
        transfer = super().from_attention(q, k, v, o, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm)
        if self.share is not None:
            nn.init.zeros_(self.share.weight)
            nn.init.zeros_(self.share.bias)
            transfer.set("share.weight", "set to 0, an even share")
            transfer.set("share.bias", "set to 0, an even share")
        return transfer
