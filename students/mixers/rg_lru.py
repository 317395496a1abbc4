"""Griffin's recurrent block with its RG-LRU (arXiv 2402.19427, section 2.4), the mixer of Hawk and RecurrentGemma.

    gate = gelu(linear_y(h))                x = conv(linear_x(h)), no activation
    r = sigmoid(W_a x + b_a)                i = sigmoid(W_x x + b_x), a block of W a head
    log a = -8 softplus(recurrent_param) r
    s_t = a s_{t-1} + sqrt(1 - a^2) i x     out = linear_out(gate s)

Parameter names and semantics are those of transformers: gelu has its tanh form, and the first token of a document enters
the state unscaled, as i x instead of sqrt(1 - a^2) i x.

The values (linear_x) and the output (linear_out) are copied from attention exactly; the convolution starts as the identity.
The gate starts open and constant, and each head starts as a decayed mean of its values. Attention's q and k cannot be used:
the gates must learn from training which tokens matter.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from students.kernels.linear_scan import linear_scan, linear_scan_step
from students.kernels.lru_token import BlockGate, block_gate, lru_token
from students.mixers.entering import Entering, Entry
from students.mixers.mixer import Context, Shape
from students.mixers.recurrent import Recurrent, carried
from students.mixers.starts import OPEN_GELU
from students.mixers.transfer import Projections, Transfer
from students.shapes import Bool, Float, Int
from students.wrapped import is_untouched

STRENGTH = 8.0  # Griffin's c
STEEPEST = 1000.0  # upper bound of the square root's gradient, as in RecurrentGemma


@dataclass(frozen=True)
class RgLruParts:
    """Inputs of the recurrence, their factors (`taken`) and the decays, with channels grouped by head."""

    values: Float[Tensor, "b t h p"]
    taken: Float[Tensor, "b t h p"]
    log_a: Float[Tensor, "b t h p"]
    documents: Int[Tensor, "b t"] | None


class RgLru(Recurrent):
    """Griffin's recurrent block with one channel for each value channel of attention, and one block of the gates a head."""

    per_channel = True
    ignores = frozenset({"q", "k", "q_bias", "k_bias", "q_norm", "k_norm"})
    copied = ("linear_x", "linear_out")
    float32 = frozenset({"rg_lru"})
    output_name = "linear_out"
    meanings = {"d_conv": "Taps of the convolution."}

    def __init__(self, shape: Shape, *, d_conv: int = 4) -> None:
        super().__init__(shape)
        heads, p = self.n_heads, self.head_dim
        width = heads * p
        self.linear_y = nn.Linear(shape.d_model, width)
        self.linear_x = nn.Linear(shape.d_model, width)
        self.conv_1d = nn.Conv1d(width, width, d_conv, groups=width, bias=True)
        self.rg_lru = Gates(heads, p)
        self.linear_out = nn.Linear(width, shape.d_model)

    def project(self, h: Float[Tensor, "b t d"], context: Context) -> RgLruParts:
        x = self.convolve(self.linear_x(h), self.conv_1d, None, context).unflatten(-1, (self.n_heads, -1))
        admit, log_a = self.rg_lru(x)
        scale = BoundedSqrt.apply(-torch.expm1(2 * log_a))
        scale = torch.where(self._begins(h, context)[..., None, None], torch.ones_like(scale), scale)
        return RgLruParts(x, scale * admit, log_a, context.documents)

    def _begins(self, h: Float[Tensor, "b t d"], context: Context) -> Bool[Tensor, "b t"]:
        """Which tokens are the first of their document."""
        documents = context.ids(h)
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        if context.state is not None:
            resumed = context.resumed(h)
            begins[:, 0] = torch.zeros_like(begins[:, 0]) if resumed is None else ~resumed
        return begins

    def mix(self, parts: RgLruParts, context: Context) -> Float[Tensor, "b t h p"]:
        x = (parts.values * parts.taken.to(parts.values.dtype)).flatten(2)
        inputs = {"x": x, "log_a": parts.log_a.flatten(2)}
        y = carried(linear_scan, linear_scan_step, inputs, parts.documents, context)
        return y.unflatten(-1, (self.n_heads, -1))

    def features(self, y: Float[Tensor, "b t h p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h p"]:
        return y * F.gelu(self.linear_y(h), approximate="tanh").unflatten(-1, (self.n_heads, -1))

    def entries(self) -> list[Entry]:
        return [Entry(self.linear_x), Entry(self.linear_y)]

    def token_features(self, entering: Entering, context: Context) -> Float[Tensor, "b 1 h p"]:
        if not is_untouched(self.rg_lru):  # hooks run only in a call
            return super().token_features(entering, context)
        x, u = (entering(entry) for entry in self.entries())
        x, gates = self.convolve(x, self.conv_1d, None, context), self.rg_lru
        y = lru_token(
            x[:, 0],
            u[:, 0],
            BlockGate(gates.input_gate_weight, gates.input_gate_bias),
            BlockGate(gates.recurrent_gate_weight, gates.recurrent_gate_bias),
            gates.recurrent_param,
            STRENGTH,
            context.held.kept("ssm"),
            entering.x.dtype,
        )
        return y.unflatten(-1, (self.n_heads, -1))[:, None]

    @torch.no_grad()
    def from_attention(self, attention: Projections) -> Transfer:
        transfer = Transfer()
        rows = self.head_rows(attention, transfer, "v")["v"].flatten(0, 1)
        self.linear_x.weight.copy_(rows[:, :-1])
        transfer.set("linear_x.weight", "copied from attention v")
        self.linear_x.bias.copy_(rows[:, -1])
        transfer.set("linear_x.bias", "set to 0" if attention.v_bias is None else "copied from attention v bias")
        self._set_new_parameters(transfer)
        self.copy_output(attention, transfer)
        return transfer

    def _set_new_parameters(self, transfer: Transfer) -> None:
        self.set_taps("conv_1d", 1.0, transfer)
        self.get_parameter("conv_1d.bias").zero_()
        transfer.set("conv_1d.bias", "set to 0")
        self.linear_y.weight.zero_()
        transfer.set("linear_y.weight", "set to 0")
        self.linear_y.bias.fill_(OPEN_GELU)
        transfer.set("linear_y.bias", f"set to {OPEN_GELU:.4f}, an open gate")
        for name, parameter in self.rg_lru.named_parameters():
            parameter.zero_()
            transfer.set(f"rg_lru.{name}", "set to 0")
        self.spread_memories("rg_lru.recurrent_param", transfer)
        transfer.set("rg_lru.input_gate_bias", "set so that the state is a decayed mean of its inputs")

    @torch.no_grad()
    def set_half_lives(self, tokens: Float[Tensor, " h"]) -> None:
        """Set decays and input gates, so that a head's state stays a mean: sqrt(1 - a^2) i (1 + a + a^2 ...) = 1."""
        log_a = -math.log(2) / tokens
        strength = -2 * log_a / STRENGTH  # the recurrent gate starts half open
        self.rg_lru.recurrent_param.copy_(strength.expm1().log().repeat_interleave(self.head_dim))
        admit = (torch.expm1(log_a) / -(1 + log_a.exp())).sqrt()
        self.rg_lru.input_gate_bias.copy_(torch.logit(admit)[:, None].expand(-1, self.head_dim))


class Gates(nn.Module):
    """The gates of the RG-LRU: the share of each channel that enters the state, and the logarithm of the state's decay."""

    input_gate_weight: nn.Parameter
    input_gate_bias: nn.Parameter
    recurrent_gate_weight: nn.Parameter
    recurrent_gate_bias: nn.Parameter

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.recurrent_param = nn.Parameter(torch.zeros(heads * width))
        for gate in ("input_gate", "recurrent_gate"):
            self.register_parameter(f"{gate}_weight", nn.Parameter(torch.zeros(heads, width, width)))
            self.register_parameter(f"{gate}_bias", nn.Parameter(torch.zeros(heads, width)))

    def forward(self, x: Float[Tensor, "b t h p"]) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b t h p"]]:
        strength = STRENGTH * F.softplus(self.recurrent_param).unflatten(0, x.shape[2:])
        log_a = -strength * block_gate(x, self.recurrent_gate_weight, self.recurrent_gate_bias)
        return block_gate(x, self.input_gate_weight, self.input_gate_bias), log_a


class BoundedSqrt(torch.autograd.Function):
    """The square root with a gradient of at most STEEPEST: near 0, at a decay of almost 1, it would become infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (0.5 * x.rsqrt()).clamp(max=STEEPEST)
