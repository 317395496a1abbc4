"""Gated linear attention (GLA, arXiv 2312.06635): linear attention with a decay for each key channel.

    log_a = logsigmoid(gate_up(gate_down(h)) + gate_bias) / 16           a vector over each head's key channels, of low rank
    y = gla(q, k, v, log_a)            out = out_proj(weight rms_norm(y, each head) silu(gate_proj(h)))

It starts as linear attention with one half-life per head: gate_up is 0. gate_down has the input directions that the copied
keys read most, so the gate first learns to separate inputs that the keys separate.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from students.kernels.gla import gla, gla_step
from students.mixers.gated_heads import GatedHeads
from students.mixers.mixer import Context, Shape
from students.mixers.projections import leading_directions
from students.mixers.recurrent import carried
from students.mixers.transfer import Transfer
from students.shapes import Float, Int
from students.wrapped import wide_linear

TEMPERATURE = 16.0  # divides the gate's logarithm: decays near 1 (section 4.4)


@dataclass(frozen=True)
class GLAParts:
    """Inputs of gated linear attention."""

    values: Float[Tensor, "b t h p"]
    q: Float[Tensor, "b t h n"]
    k: Float[Tensor, "b t h n"]
    log_a: Float[Tensor, "b t h n"]
    documents: Int[Tensor, "b t"] | None


class GatedLinearAttention(GatedHeads):
    """GLA with a head for each attention head."""

    float32 = frozenset({"gate_bias"})
    meanings = {"gate_rank": "Channels between the two maps that make the decays."}

    def __init__(self, shape: Shape, *, gate_rank: int = 16) -> None:
        super().__init__(shape)
        width = self.n_heads * self.head_dim
        self.gate_down = nn.Linear(shape.d_model, gate_rank, bias=False)
        self.gate_up = nn.Linear(gate_rank, width, bias=False)
        self.gate_bias = nn.Parameter(torch.zeros(width))

    def project(self, h: Float[Tensor, "b t d"], context: Context) -> GLAParts:
        q, k, v = self.heads(h)
        gate = wide_linear(self.gate_down(h), self.gate_up, self.gate_bias)
        log_a = F.logsigmoid(gate).unflatten(-1, (self.n_heads, -1)) / TEMPERATURE
        return GLAParts(v, q, k, log_a, context.documents)

    def mix(self, parts: GLAParts, context: Context) -> Float[Tensor, "b t h p"]:
        inputs = {"q": parts.q, "k": parts.k, "v": parts.values, "log_a": parts.log_a}
        return carried(gla, gla_step, inputs, parts.documents, context)

    @torch.no_grad()
    def set_decays(self, k: Float[Tensor, "h p d"], transfer: Transfer) -> None:
        self.gate_down.weight.copy_(leading_directions(k, len(self.gate_down.weight)))
        transfer.set("gate_down.weight", "the input directions that attention k reads most (its first singular vectors)")
        self.gate_up.weight.zero_()
        transfer.set("gate_up.weight", "set to 0")
        self.spread_memories("gate_bias", transfer)

    @torch.no_grad()
    def set_half_lives(self, tokens: Float[Tensor, " h"]) -> None:
        a = -math.log(2) * TEMPERATURE / tokens.double()  # the logarithm of the sigmoid
        self.gate_bias.copy_((a - torch.log(-torch.expm1(a))).repeat_interleave(self.head_dim))
