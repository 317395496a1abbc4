"""Gated DeltaNet (arXiv 2412.06464), with the parametrisation and the parameter names of transformers' Qwen3.5.

    q, k, v = silu(conv(in_proj_qkv(h)))                 q, k to unit length, q over sqrt(n)
    beta = sigmoid(in_proj_b(h))                         log_a = -exp(A_log) softplus(in_proj_a(h) + dt_bias)
    y = gated_delta_rule(q, k, v, log_a, beta)
    out = out_proj(weight rms_norm(y, each head) silu(in_proj_z(h)))

Qwen3-Next's layer is the same function with its rows in another order. Here every attention head has its own keys, and the
convolution has a bias if attention's projections have one. The start is a point where the mixer is almost linear:

  - A convolution tap of 0.25, where silu is almost a line. q and k then have attention's directions, and v has attention's
    values except for their size.
  - beta = 1/2 (its rows are 0). A token's value replaces half of the value stored under its key, so repeated keys do not add
    up as in linear attention. dt = 1, and A has the decays, with half-lives of 4 to 512 tokens.
  - A gate that is constant on real inputs, as in `mamba2`.
  - The norm removes the size of each head's output. The factor of a head therefore goes to its columns of out_proj.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from students.kernels.delta_token import Decay, delta_token
from students.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from students.kernels.ssm_token import Conv
from students.mixers.entering import Entering, Entry
from students.mixers.mixer import Context, Shape
from students.mixers.projections import Norm, l2_norm
from students.mixers.recurrent import Recurrent, carried
from students.mixers.starts import DT, OPEN_SILU, TAP, constant_row
from students.mixers.transfer import Projections, Transfer
from students.shapes import Float, Int
from students.wrapped import is_untouched, taps, wide_linear


@dataclass(frozen=True)
class GatedDeltaParts:
    """Inputs of the gated delta rule."""

    values: Float[Tensor, "b t h p"]
    q: Float[Tensor, "b t h n"]
    k: Float[Tensor, "b t h n"]
    log_a: Float[Tensor, "b t h"]
    beta: Float[Tensor, "b t h"]
    documents: Int[Tensor, "b t"] | None


class GatedDeltaNet(Recurrent):
    """Gated DeltaNet with one key head and one value head for each attention head."""

    copied = ("in_proj_qkv", "out_proj")
    float32 = frozenset({"A_log", "dt_bias"})
    meanings = {"d_conv": "Taps of the convolution."}

    def __init__(self, shape: Shape, *, d_conv: int = 4) -> None:
        super().__init__(shape)
        width = self.n_heads * self.head_dim
        self.in_proj_qkv = nn.Linear(shape.d_model, 3 * width, bias=False)
        self.in_proj_z = nn.Linear(shape.d_model, width, bias=False)
        self.in_proj_b = nn.Linear(shape.d_model, self.n_heads, bias=False)
        self.in_proj_a = nn.Linear(shape.d_model, self.n_heads, bias=False)
        self.conv1d = nn.Conv1d(3 * width, 3 * width, d_conv, groups=3 * width, bias=shape.qkv_bias)
        self.dt_bias = nn.Parameter(torch.zeros(self.n_heads))
        self.A_log = nn.Parameter(torch.zeros(self.n_heads))
        self.norm = Norm(self.head_dim, shape.norm_eps)
        self.out_proj = nn.Linear(width, shape.d_model, bias=shape.o_bias)

    def project(self, h: Float[Tensor, "b t d"], context: Context) -> GatedDeltaParts:
        qkv = self.convolve(self.in_proj_qkv(h), self.conv1d, "silu", context)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in qkv.chunk(3, -1))
        dt = F.softplus(wide_linear(h, self.in_proj_a, self.dt_bias))
        return GatedDeltaParts(
            values=v,
            q=l2_norm(q) * self.head_dim**-0.5,
            k=l2_norm(k),
            log_a=-dt * self.A_log.exp(),
            beta=torch.sigmoid(self.in_proj_b(h)),
            documents=context.documents,
        )

    def mix(self, parts: GatedDeltaParts, context: Context) -> Float[Tensor, "b t h p"]:
        inputs = {"q": parts.q, "k": parts.k, "v": parts.values, "log_a": parts.log_a, "beta": parts.beta}
        return carried(gated_delta_rule, gated_delta_rule_step, inputs, parts.documents, context)

    def features(self, y: Float[Tensor, "b t h p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h p"]:
        gate = F.silu(self.in_proj_z(h)).unflatten(-1, (self.n_heads, -1))
        return self.norm(y) * gate

    def entries(self) -> list[Entry]:
        layers = self.in_proj_qkv, self.in_proj_b, self.in_proj_a, self.in_proj_z
        return [Entry(layer, wide=layer is self.in_proj_a) for layer in layers]

    def token_features(self, entering: Entering, context: Context) -> Float[Tensor, "b 1 h p"]:
        x, b, decay, z = (entering(entry) for entry in self.entries())
        if not is_untouched(self.norm):  # hooks run only in a call
            return super().token_features(entering, context)
        (weight, bias), state = taps(self.conv1d, x), context.held
        return delta_token(
            x[:, 0],
            b[:, 0],
            decay[:, 0],
            z[:, 0],
            Conv(weight, bias, "silu", state.kept("conv")),
            Decay(self.dt_bias, self.A_log),
            (self.norm.weight, self.norm.eps),
            state.kept("ssm"),
            context.column,
            entering.x.dtype,
        )[:, None]

    @torch.no_grad()
    def from_attention(self, attention: Projections) -> Transfer:
        transfer = Transfer()
        heads = self.head_rows(attention, transfer)
        rows = torch.cat([heads[name].flatten(0, 1) for name in "qkv"])
        self.in_proj_qkv.weight.copy_(rows[:, :-1])
        folded = "" if attention.q_norm is None else ", the weights of the norms on q and k folded in"
        transfer.set("in_proj_qkv.weight", f"copied from attention q, k and v{folded}")
        self.set_taps("conv1d", TAP, transfer)
        if self.conv1d.bias is not None:
            self.conv1d.bias.copy_(TAP * rows[:, -1])
            transfer.set("conv1d.bias", f"attention q, k and v biases times {TAP}")
        self._set_new_parameters(transfer)
        self.copy_output(attention, transfer)
        return transfer

    def _set_new_parameters(self, transfer: Transfer) -> None:
        for name, meaning in (("z", "a gate that calibration opens"), ("b", "beta = 1/2"), ("a", "a constant dt")):
            getattr(self, f"in_proj_{name}").weight.zero_()
            transfer.set(f"in_proj_{name}.weight", f"set to 0: {meaning}")
        self.dt_bias.fill_(math.log(math.expm1(DT)))
        transfer.set("dt_bias", f"set for dt = {DT:g}")
        self.spread_memories("A_log", transfer)
        self.norm.weight.fill_(1.0)
        transfer.set("norm.weight", "set to 1")

    @torch.no_grad()
    def calibrate(self, h: Float[Tensor, "b t d"], transfer: Transfer) -> None:
        """Open the gate on these inputs."""
        w, residual = constant_row(h)
        self.in_proj_z.weight.copy_((OPEN_SILU * w).expand_as(self.in_proj_z.weight))
        transfer.set("in_proj_z.weight", f"a constant gate by least squares on real inputs (residual {residual:.1e})")

    @torch.no_grad()
    def set_half_lives(self, tokens: Float[Tensor, " h"]) -> None:
        self.A_log.copy_((math.log(2) / DT / tokens).log())
