"""Longhorn (arXiv 2407.14207): a state-space mixer that solves an online least-squares problem for each channel and token.

    x, z = in_proj(h)                   x = silu(conv(x))
    k, q = kq_proj(h)                   beta = sigmoid(beta_up(beta_down(h)) + beta_bias)
    Delta = beta / (1 + beta k^T k)
    S_t = (1 - Delta_t k_t^2) S_{t-1} + Delta_t x_t k_t         a row of S for each channel, k^2 channel by channel
    out = out_proj(scale gain silu(z) (S q + D x))

S_t minimises ||S - S_{t-1}||^2 + beta |S k_t - x_t|^2 if k k^T is taken as diagonal. The keys determine how fast a channel
forgets: a token overwrites the share Delta k^2 of the state.

Differences from the authors' layer: There is a key and a query for each attention head instead of one for all channels. They
are projections of the input, as in Mamba-2, and not of x, so that attention's can be copied (their best factors of rank
d_state). Each head has an output scale, as in `discrete_mamba2`.

The start: a convolution tap of 0.25, a gate constant on real inputs, D = 0, beta = 1/2. On real inputs, keys are scaled so
that a head's memory halves in 4 to 512 tokens, spread over the heads, and queries are divided by the same factor.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from students.kernels.linear_scan import linear_scan, linear_scan_step
from students.mixers.mixer import Context, Shape
from students.mixers.projections import leading_directions, logit_factors
from students.mixers.recurrent import Recurrent, carried
from students.mixers.starts import HALF_LIVES, OPEN_SILU, TAP, constant_row, spread_half_lives
from students.mixers.transfer import Projections, Transfer
from students.shapes import Float, Int
from students.wrapped import Rows, wide_linear

PIECE = 128  # tokens whose states are in memory at one time


@dataclass(frozen=True)
class LonghornParts:
    """Inputs of the recurrence, with channels grouped by head."""

    values: Float[Tensor, "b t h p"]
    k: Float[Tensor, "b t h n"]
    q: Float[Tensor, "b t h n"]
    beta: Float[Tensor, "b t h p"]
    D: Float[Tensor, "h p"]
    documents: Int[Tensor, "b t"] | None


class Longhorn(Recurrent):
    """Longhorn with a key and a query for each attention head."""

    per_channel = True
    has_decay = False
    copied = ("in_proj", "kq_proj", "out_proj")
    float32 = frozenset({"beta_bias", "D", "gain", "scale"})
    scale: Tensor
    meanings = {
        "d_state": "State size of a channel.",
        "d_conv": "Taps of the convolution.",
        "beta_rank": "Rank of the projection to beta. Default: the model's width / 16, rounded up.",
    }

    def __init__(self, shape: Shape, *, d_state: int = 16, d_conv: int = 4, beta_rank: int | None = None) -> None:
        super().__init__(shape)
        self.d_state, width = d_state, self.n_heads * self.head_dim
        self.in_proj = nn.Linear(shape.d_model, 2 * width, bias=False)
        self.conv1d = nn.Conv1d(width, width, d_conv, groups=width, bias=True)
        self.kq_proj = nn.Linear(shape.d_model, 2 * self.n_heads * d_state, bias=shape.qkv_bias)
        rank = math.ceil(shape.d_model / 16) if beta_rank is None else beta_rank
        self.beta_down = nn.Linear(shape.d_model, rank, bias=False)
        self.beta_up = nn.Linear(rank, width, bias=False)
        self.beta_bias = nn.Parameter(torch.zeros(width))
        self.D = nn.Parameter(torch.zeros(self.n_heads, self.head_dim))
        self.gain = nn.Parameter(torch.ones(self.n_heads))
        self.register_buffer("scale", torch.ones(self.n_heads))
        self.out_proj = nn.Linear(width, shape.d_model, bias=shape.o_bias)

    def project(self, h: Float[Tensor, "b t d"], context: Context) -> LonghornParts:
        x = self.convolve(Rows(self.in_proj, h)(0, self.n_heads * self.head_dim), self.conv1d, "silu", context)
        k, q = self.kq_proj(h).chunk(2, -1)
        beta = torch.sigmoid(wide_linear(self.beta_down(h), self.beta_up, self.beta_bias))
        x, k, q, beta = (part.unflatten(-1, (self.n_heads, -1)) for part in (x, k, q, beta))
        return LonghornParts(x, k, q, beta, self.D, context.documents)

    def mix(self, parts: LonghornParts, context: Context) -> Float[Tensor, "b t h p"]:
        inputs = {"x": parts.values, "k": parts.k, "q": parts.q, "beta": parts.beta}
        y = carried(online_scan, online_step, inputs, parts.documents, context)
        return y + parts.D.to(y.dtype) * parts.values

    def features(self, y: Float[Tensor, "b t h p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h p"]:
        gate = F.silu(Rows(self.in_proj, h)(self.n_heads * self.head_dim, None)).unflatten(-1, (self.n_heads, -1))
        return y * gate * (self.scale * self.gain).to(y.dtype)[:, None]

    @torch.no_grad()
    def from_attention(self, attention: Projections) -> Transfer:
        transfer = Transfer()
        rows = self.head_rows(attention, transfer)
        C, B = logit_factors(rows["q"], rows["k"], self.d_state)
        x, kq = rows["v"].flatten(0, 1), torch.cat([B.flatten(0, 1), C.flatten(0, 1)])
        self.in_proj.weight.zero_()
        self.in_proj.weight[: len(x)] = x[:, :-1]
        transfer.set("in_proj.weight", "x copied from attention v; z set to 0: a gate that calibration opens")
        self.set_taps("conv1d", TAP, transfer)
        self.get_parameter("conv1d.bias").copy_(TAP * x[:, -1])
        transfer.set("conv1d.bias", "set to 0" if attention.v_bias is None else f"attention v bias times {TAP}")
        self.kq_proj.weight.copy_(kq[:, :-1])
        exact = "copied from" if self.d_state >= self.head_dim else f"rank-{self.d_state} factors of the logits of"
        folded = "" if attention.q_norm is None else " (their norms' weights folded in)"
        transfer.set("kq_proj.weight", f"{exact} attention k and q{folded}, softmax scale in q")
        if self.kq_proj.bias is not None:
            self.kq_proj.bias.copy_(kq[:, -1])
            transfer.set("kq_proj.bias", "attention k and q biases, made as kq_proj.weight")
        self._set_new_parameters(rows["k"][..., :-1], transfer)
        self.copy_output(attention, transfer)
        return transfer

    def _set_new_parameters(self, k: Float[Tensor, "h p d"], transfer: Transfer) -> None:
        self.beta_down.weight.copy_(leading_directions(k, len(self.beta_down.weight)))
        transfer.set("beta_down.weight", "the input directions that attention k reads most (its first singular vectors)")
        for name, tensor, value in (
            ("beta_up.weight", self.beta_up.weight, 0.0),
            ("beta_bias", self.beta_bias, 0.0),
            ("D", self.D, 0.0),
            ("gain", self.gain, 1.0),
            ("scale", self.scale, 1.0),
        ):
            tensor.fill_(value)
            transfer.set(name, f"set to {value:g}" + (", beta = 1/2" if name == "beta_bias" else ""))

    @torch.no_grad()
    def calibrate(self, h: Float[Tensor, "b t d"], transfer: Transfer) -> None:
        """Make the gate constant on these inputs, and scale keys for the half-lives of the heads."""
        w, residual = constant_row(h)
        gate = self.in_proj.weight.chunk(2)[1]
        gate.copy_((OPEN_SILU * w).expand_as(gate))
        transfer.add("in_proj.weight", f"z a constant gate by least squares on real inputs (residual {residual:.1e})")
        parts = self.project(h, Context())
        power = parts.k.square().mean((0, 1, 3)).clamp_min(1e-12)
        lost = math.log(2) / spread_half_lives(self.n_heads).to(power)  # per channel and token: beta k^2 on average
        factor = (lost / parts.beta.mean() / power).sqrt().repeat_interleave(self.d_state)
        factor = torch.cat([factor, 1 / factor])
        for parameter in self.kq_proj.parameters():
            parameter.mul_(factor.view(-1, *(1,) * (parameter.dim() - 1)))
        shortest, longest = HALF_LIVES
        change = f"k to the size of half-lives of {shortest:g} to {longest:g} tokens on real inputs, q divided by as much"
        for name, _ in self.kq_proj.named_parameters():
            transfer.add(f"kq_proj.{name}", change)

    @torch.no_grad()
    def rescale(self, factors: Float[Tensor, " h"]) -> None:
        self.scale.mul_(factors)


def online_scan(
    x: Float[Tensor, "b t h p"],
    k: Float[Tensor, "b t h n"],
    q: Float[Tensor, "b t h n"],
    beta: Float[Tensor, "b t h p"],
    documents: Int[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """The recurrence over a whole sequence, as a diagonal scan of all (channel, state) pairs.

    It runs piece by piece, and each piece is recomputed for its gradient: all states together would be d_state times as
    large as x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    state = x.new_zeros(x.shape[0], *x.shape[2:], k.shape[3], dtype=dtype) if initial_state is None else initial_state
    outputs = []
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, x.shape[1], PIECE):
            piece = slice(start, start + PIECE)
            ids = None if documents is None else documents[:, piece]
            if documents is not None and ids is not None and start:
                state = state * (ids[:, 0] == documents[:, start - 1]).to(dtype)[:, None, None, None]
            inputs = (part[:, piece].to(dtype) for part in (x, k, q, beta))
            y, state = checkpoint(_piece, *inputs, ids, state, use_reentrant=False, preserve_rng_state=False)
            outputs.append(y)
    return torch.cat(outputs, 1).to(x.dtype), state


def online_step(
    x: Float[Tensor, "b h p"],
    k: Float[Tensor, "b h n"],
    q: Float[Tensor, "b h n"],
    beta: Float[Tensor, "b h p"],
    state: Float[Tensor, "b h p n"],
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p n"]]:
    """One token of the recurrence: y and the new state."""
    with torch.autocast(x.device.type, enabled=False):
        added, log_a = _terms(*(part.to(state.dtype) for part in (x, k, beta)))
        _, new = linear_scan_step(added.flatten(1), log_a.flatten(1), state.flatten(1))
        new = new.view_as(state)
        y = (new @ q.to(state.dtype)[..., None]).squeeze(-1)
    return y.to(x.dtype), new


def _piece(x, k, q, beta, documents, state):
    added, log_a = _terms(x, k, beta)
    states, final = linear_scan(added.flatten(2), log_a.flatten(2), documents, state.flatten(1))
    return (states.view_as(added) @ q[..., None]).squeeze(-1), final.view_as(state)


def _terms(x: Tensor, k: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Delta x k and log(1 - Delta k^2) of every pair [... h p n]; the logarithm is a difference that stays finite."""
    length = k.square().sum(-1, keepdim=True)  # [... h 1]
    step = beta / (1 + beta * length)
    others = (length - k.square()).clamp_min(0)[..., None, :]  # k^T k without the pair's own square
    log_a = torch.log1p(beta[..., None] * others) - torch.log1p(beta * length)[..., None]
    return (step * x)[..., None] * k[..., None, :], log_a
