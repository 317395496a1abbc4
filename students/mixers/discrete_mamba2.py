"""Discrete Mamba-2, the mixer of Phi-Mamba (MOHAWK, arXiv 2408.10189, section 3 and appendix A).

Of the SSM mixers it is the one most similar to attention:

    x, B, C = conv(in_proj(h))          one B and C a head, no activation
    log_a = -softplus(a_proj(h))        the decay itself is projected; there is no dt
    y = ssd(x, log_a, B, C) + D x
    out = out_proj(scale silu(z_proj(h) + z_bias) y)

Differences from the authors' code: D starts at 0 instead of 1. The output has a scale for each head, which is solved by
least squares and makes an unnormalised q k^T usable. An RMSNorm of each head may come before the scale (`norm`).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from students.kernels.ssm_token import Gate
from students.mixers.entering import Entering, Entry
from students.mixers.mixer import Context, Shape
from students.mixers.projections import rms_norm, rotate
from students.mixers.starts import OPEN_SILU
from students.mixers.state_space import StateSpace, StateSpaceParts, TokenInputs
from students.mixers.transfer import Projections, Transfer
from students.shapes import Float
from students.wrapped import wide_linear


class DiscreteMamba2(StateSpace):
    """Multi-head discrete Mamba-2 with one SSM head for each attention head.

    Raises:
        ValueError: rope with a d_state other than head_dim.
    """

    float32 = frozenset({"a_proj", "D", "gain", "scale"})
    scale: Tensor
    meanings = StateSpace.meanings | {
        "rope": "Rotate C and B as attention rotates q and k. `d_state` must then be the width of an attention head.",
        "norm": "Put an RMSNorm on each head's output.",
    }

    def __init__(
        self,
        shape: Shape,
        *,
        d_state: int | None = None,
        d_conv: int = 4,
        rope: bool = False,
        norm: bool = False,
        lag: int = 0,
    ) -> None:
        super().__init__(shape, d_state, lag)
        n_heads = self.n_heads
        if rope and self.d_state != self.head_dim:
            raise ValueError(f"rope rotates B and C like q and k: d_state must be {self.head_dim}, not {self.d_state}")
        if rope and shape.rope is None:
            raise ValueError("rope: true, but the model's attention has no rotary embedding to take it from")
        self.rope = shape.rope if rope else None
        width = n_heads * self.head_dim
        channels = width + 2 * n_heads * self.d_state
        self.in_proj = nn.Linear(shape.d_model, channels, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, bias=True)
        self.a_proj = nn.Linear(shape.d_model, n_heads)
        self.z_proj = nn.Linear(shape.d_model, width)
        self.D = nn.Parameter(torch.zeros(n_heads))
        self.norm = nn.Parameter(torch.ones(n_heads, self.head_dim)) if norm else None
        self.gain = nn.Parameter(torch.ones(n_heads))
        # The solved scale can be 1/500, too small for steps of Adam: it is a constant, times a gain that learns.
        self.register_buffer("scale", torch.ones(n_heads))
        self.out_proj = nn.Linear(width, shape.d_model, bias=shape.o_bias)

    def project(self, h: Float[Tensor, "b t d"], context: Context) -> StateSpaceParts:
        raw = self.in_proj(h)
        v, k, q = self._split(raw)
        x, B, C = self._split(self.convolve(raw, self.conv1d, None, context))
        if self.rope:
            B, C = (rotate(part, context.tables, self.rope) for part in (B, C))
        log_a = -F.softplus(wide_linear(h, self.a_proj))
        return StateSpaceParts(x, B, C, log_a, None, self.D, context.documents, q, k, v)

    def entries(self) -> list[Entry]:
        return [Entry(self.in_proj), Entry(self.z_proj), Entry(self.a_proj, wide=True)]

    def token_inputs(self, entering: Entering) -> TokenInputs:
        x, z, decay = (entering(entry) for entry in self.entries())
        gate = Gate(z[:, 0], self.norm, self.norm_eps, (self.scale, self.gain))
        return TokenInputs(x, decay, gate=gate, rope=self.rope)

    def lent(self, entering: Entering) -> tuple[Tensor, Tensor, Tensor]:
        v, k, q = self._split(entering(self.entries()[0]))
        return q[:, 0], k[:, 0], v[:, 0]

    def _split(self, channels: Float[Tensor, "b t c"]) -> tuple[Tensor, Tensor, Tensor]:
        width, states = self.n_heads * self.head_dim, self.n_heads * self.d_state
        parts = channels.split([width, states, states], -1)
        return tuple(part.unflatten(-1, (self.n_heads, -1)) for part in parts)

    def features(self, y: Float[Tensor, "b t h p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h p"]:
        y = y * F.silu(self.z_proj(h)).unflatten(-1, (self.n_heads, -1))
        if self.norm is not None:
            y = rms_norm(y, self.norm_eps) * self.norm.to(y.dtype)
        return y * (self.scale * self.gain).to(y.dtype)[:, None]

    @torch.no_grad()
    def from_attention(self, attention: Projections) -> Transfer:
        transfer = Transfer()
        x, B, C, how = self.attention_rows(attention, self.n_heads, transfer)
        rows = torch.cat([part.flatten(0, 1) for part in (x, B, C)])
        self.in_proj.weight.copy_(rows[:, :-1])
        transfer.set("in_proj.weight", f"x copied from attention v, {how}")
        self.set_taps("conv1d", 1.0, transfer)
        self.get_parameter("conv1d.bias").copy_(rows[:, -1])
        transfer.set("conv1d.bias", "copied from attention q, k and v biases" if attention.biased else "set to 0")
        self._set_new_parameters(transfer)
        self.copy_output(attention, transfer)
        return transfer

    def _set_new_parameters(self, transfer: Transfer) -> None:
        self.a_proj.weight.zero_()
        transfer.set("a_proj.weight", "set to 0")
        self.spread_memories("a_proj.bias", transfer)
        self.z_proj.weight.zero_()
        transfer.set("z_proj.weight", "set to 0")
        self.z_proj.bias.fill_(OPEN_SILU)
        transfer.set("z_proj.bias", f"set to {OPEN_SILU:.4f}, an open gate")
        self.D.zero_()
        transfer.set("D", "set to 0")
        for name, tensor in (("gain", self.gain), ("scale", self.scale), ("norm", self.norm)):
            if tensor is not None:
                tensor.fill_(1.0)
                transfer.set(name, "set to 1")

    @torch.no_grad()
    def set_half_lives(self, tokens: Float[Tensor, " h"]) -> None:
        self.a_proj.bias.copy_((math.log(2) / tokens).expm1().log())

    @torch.no_grad()
    def rescale(self, factors: Float[Tensor, " h"]) -> None:
        self.scale.mul_(factors)
