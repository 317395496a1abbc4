"""Mamba (arXiv 2312.00752, section 3), with the parametrisation and the parameter names of transformers.

    x, z = in_proj(h)                           x = silu(conv(x))
    dt_low, B, C = x_proj(x)                    dt = softplus(dt_proj(dt_low) + bias)
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T  A = -exp(A_log), a number for each channel and state
    out = out_proj(silu(z) (S C + D x))

Every channel forgets at its own rate, and all channels of a group share B and C (one group in the stock form). B and C are
projections of x and not of h, so attention's keys and queries cannot be copied. They are fitted:

  - The target for B and C of a group is a constant 1, and the best rank-(n - 1) factors of the mean of its heads' logits,
    scaled to unit size on real inputs: C B = 1 + c logits is the beginning of the series of exp(logits). Without the 1,
    layer 24 of SmolLM2 starts with 94 % of its output's power unexplained; with it, 29 %. Norms on q and k are folded in,
    except for their divisor.
  - The rows of x_proj are the least-squares solution for this target on x. They are first computed from the weights alone,
    with silu taken as linear, and then on real inputs (`calibrate`). The transfer record says how much of B's and C's power
    remains unexplained.

The other parameters start where the mixer is almost linear in attention's values: a convolution tap of 0.25, a gate that is
constant on real inputs, D = 0. A = -1 and dt = ln 2 / half-life make the state a decayed mean of its inputs.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from students.kernels.selective_scan import selective_scan, selective_scan_step
from students.kernels.selective_token import selective_token
from students.mixers.entering import Entering, Entry, leaving
from students.mixers.mixer import Context, Shape
from students.mixers.projections import Norm, group_factors, least_squares, lost_power
from students.mixers.recurrent import Recurrent, carried
from students.mixers.starts import OPEN_SILU, TAP, constant_row
from students.mixers.transfer import Projections, Transfer
from students.shapes import Float, Int
from students.wrapped import Rows, is_plain, wide_linear

QUIET = 0.1  # weight of the norm on dt's input: the input is 0 at first, and the norm enlarges even tiny values to this size


@dataclass(frozen=True)
class Mamba1Parts:
    """Inputs of the selective scan, with channels grouped by head."""

    values: Float[Tensor, "b t h p"]
    dt: Float[Tensor, "b t c"]
    A: Float[Tensor, "c n"]
    B: Float[Tensor, "b t g n"]
    C: Float[Tensor, "b t g n"]
    D: Float[Tensor, " c"]
    documents: Int[Tensor, "b t"] | None


class Mamba1(Recurrent):
    """Mamba with one channel for each value channel of attention, in the order of the heads.

    Raises:
        ValueError: n_groups does not divide the number of attention heads, or d_state is below 2.
    """

    per_channel = True
    copied = ("in_proj", "out_proj")
    float32 = frozenset({"A_log", "D", "dt_proj"})
    dt_layernorm: nn.Module
    b_layernorm: nn.Module
    c_layernorm: nn.Module
    meanings = {
        "d_state": "State size of a channel, 2 or more.",
        "d_conv": "Taps of the convolution.",
        "dt_rank": "Rank of the projection to the time step. Default: the model's width / 16, rounded up.",
        "n_groups": "Number of groups of heads; each group has its own B and C. The stock form has 1.",
        "norms": "Put an RMSNorm on the time step's low-rank input, on B and on C, as in Jamba (arXiv 2403.19887).",
    }

    def __init__(
        self,
        shape: Shape,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | None = None,
        n_groups: int = 1,
        norms: bool = False,
    ) -> None:
        super().__init__(shape)
        if self.n_heads % n_groups:
            raise ValueError(f"n_groups {n_groups} does not divide the {self.n_heads} attention heads")
        if d_state < 2:
            raise ValueError(f"d_state must be at least 2 (a constant and one factor of the logits), not {d_state}")
        self.d_state, self.n_groups = d_state, n_groups
        self.dt_rank = math.ceil(shape.d_model / 16) if dt_rank is None else dt_rank
        self.d_inner = width = self.n_heads * self.head_dim
        self.in_proj = nn.Linear(shape.d_model, 2 * width, bias=False)
        self.conv1d = nn.Conv1d(width, width, d_conv, groups=width, bias=True)
        self.x_proj = nn.Linear(width, self.dt_rank + 2 * n_groups * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, width)
        self.A_log = nn.Parameter(torch.zeros(width, d_state))
        self.D = nn.Parameter(torch.zeros(width))
        self.out_proj = nn.Linear(width, shape.d_model, bias=shape.o_bias)
        for name, size in {"dt": self.dt_rank, "b": d_state, "c": d_state}.items():
            self.add_module(f"{name}_layernorm", Norm(size, shape.norm_eps) if norms else nn.Identity())
        self._wanted: Tensor | None = None

    def project(self, h: Float[Tensor, "b t d"], context: Context) -> Mamba1Parts:
        x = self.convolve(Rows(self.in_proj, h)(0, self.d_inner), self.conv1d, "silu", context)
        states = self.n_groups * self.d_state
        dt, B, C = self.x_proj(x).split([self.dt_rank, states, states], -1)
        return Mamba1Parts(
            values=x.unflatten(-1, (self.n_heads, -1)),
            dt=F.softplus(wide_linear(self.dt_layernorm(dt), self.dt_proj)),
            A=-self.A_log.exp(),
            B=self.b_layernorm(B.unflatten(-1, (self.n_groups, -1))),
            C=self.c_layernorm(C.unflatten(-1, (self.n_groups, -1))),
            D=self.D,
            documents=context.documents,
        )

    def mix(self, parts: Mamba1Parts, context: Context) -> Float[Tensor, "b t h p"]:
        x = parts.values.flatten(2)
        scan, step = (partial(run, A=parts.A) for run in (selective_scan, selective_scan_step))
        inputs = {"x": x, "dt": parts.dt, "B": parts.B, "C": parts.C}
        y = carried(scan, step, inputs, parts.documents, context) + parts.D.to(x.dtype) * x
        return y.unflatten(-1, (self.n_heads, -1))

    def features(self, y: Float[Tensor, "b t h p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h p"]:
        z = Rows(self.in_proj, h)(self.d_inner, None)
        return y * F.silu(z).unflatten(-1, (self.n_heads, -1))

    def entries(self) -> list[Entry]:
        return [Entry(self.in_proj, None, self.d_inner), Entry(self.in_proj, self.d_inner, None)]

    def token_features(self, entering: Entering, context: Context) -> Float[Tensor, "b 1 h p"]:
        x, z = (entering(entry) for entry in self.entries())
        x, states = self.convolve(x, self.conv1d, "silu", context), self.n_groups * self.d_state
        dt, B, C = leaving(self.x_proj, x.to(entering.x.dtype), None).split([self.dt_rank, states, states], -1)
        dt, exact = self.dt_layernorm(dt), is_plain(self.dt_proj) and self.dt_proj.weight.dtype == torch.float32
        dt = leaving(self.dt_proj, dt.float(), None) if exact else wide_linear(dt, self.dt_proj)
        B, C = (part[:, 0].unflatten(-1, (self.n_groups, -1)) for part in (B, C))
        y = selective_token(
            x[:, 0],
            dt[:, 0],
            self.A_log,
            self.b_layernorm(B),
            self.c_layernorm(C),
            self.D,
            z[:, 0],
            context.held.kept("ssm"),
            entering.x.dtype,
        )
        return y.unflatten(-1, (self.n_heads, -1))[:, None]

    @torch.no_grad()
    def from_attention(self, attention: Projections) -> Transfer:
        transfer = Transfer()
        rows = self.head_rows(attention, transfer)
        x = rows["v"].flatten(0, 1)
        self.in_proj.weight.zero_()
        self.in_proj.weight[: self.d_inner] = x[:, :-1]
        transfer.set("in_proj.weight", "x copied from attention v; z set to 0")
        self.set_taps("conv1d", TAP, transfer)
        self.get_parameter("conv1d.bias").copy_(TAP * x[:, -1])
        transfer.set("conv1d.bias", "set to 0" if attention.v_bias is None else f"attention v bias times {TAP}")
        lost = self._set_wanted(rows["q"], rows["k"])
        self._fit(TAP / 2 * x.T, cast(Tensor, self._wanted).T)
        rank = f"rank-{self.d_state - 1} factors of the mean logits of {self.n_heads // self.n_groups} heads a group"
        made = f"B and C fitted on x to a constant and {rank} from k and q ({lost:.1%} of the logits' power lost)"
        transfer.set("x_proj.weight", f"{made}; dt set to 0")
        self._set_new_parameters(transfer)
        self.copy_output(attention, transfer)
        return transfer

    def _set_wanted(self, q: Float[Tensor, "h p e"], k: Float[Tensor, "h p e"]) -> float:
        """Store the targets of each group's B and C for `calibrate`, as maps of [h, 1]: a constant, then factors of logits.

        Returns:
            the share of the logits' power that is not in these factors.
        """
        C, B = group_factors(q, k, self.n_groups, self.d_state - 1, self.sharing)
        constant = q.new_zeros(self.n_groups, 1, q.shape[-1])
        constant[..., -1] = 1.0
        self._wanted = torch.cat([torch.cat([constant, part], 1).flatten(0, 1) for part in (B, C)])
        return lost_power(q, k, C, B)

    def _fit(self, x: Float[Tensor, "s c"], wanted: Float[Tensor, "s k"]) -> float:
        solution, unexplained = least_squares(x, wanted)
        self.x_proj.weight[self.dt_rank :] = solution.T.to(self.x_proj.weight.dtype)
        return unexplained

    def _set_new_parameters(self, transfer: Transfer) -> None:
        self.x_proj.weight[: self.dt_rank] = 0.0
        self.dt_proj.weight.zero_()
        channel = torch.arange(self.d_inner, device=self.dt_proj.weight.device)
        self.dt_proj.weight[channel, channel * self.dt_rank // self.d_inner] = 1.0
        transfer.set("dt_proj.weight", "set to 1 from each of its inputs to a run of channels")
        self.A_log.zero_()
        transfer.set("A_log", "set to 0, A = -1")
        self.spread_memories("dt_proj.bias", transfer)
        self.D.zero_()
        transfer.set("D", "set to 0")
        sizes = {"dt": QUIET, "b": (2 / self.d_state) ** 0.5, "c": (2 / self.d_state) ** 0.5}
        for name, size in sizes.items() if isinstance(self.b_layernorm, Norm) else ():
            getattr(self, f"{name}_layernorm").weight.fill_(size)
            transfer.set(f"{name}_layernorm.weight", f"set to {size:.3g}")

    @torch.no_grad()
    def calibrate(self, h: Float[Tensor, "b t d"], transfer: Transfer) -> None:
        """Make the gate constant on these inputs, and fit B and C to their targets on them."""
        tokens = h.flatten(0, 1)
        w, residual = constant_row(h)
        self.in_proj.weight[self.d_inner :] = OPEN_SILU * w
        transfer.add("in_proj.weight", f"z a constant gate by least squares on real inputs (residual {residual:.1e})")
        x = self.project(h, Context()).values.flatten(0, 1).flatten(1)
        of_inputs = cast(Tensor, self._wanted)
        wanted = (tokens @ of_inputs[:, :-1].T.to(h) + of_inputs[:, -1].to(h)).unflatten(1, (2, self.n_groups, -1))
        size = wanted[..., 1:].square().sum(-1, keepdim=True).mean(0).sqrt()
        wanted[..., 1:] /= size.clamp_min(1e-12)
        unexplained = self._fit(x, wanted.flatten(1))
        transfer.add("x_proj.weight", f"B and C fitted on real inputs, {unexplained:.1%} of their power unexplained")

    @torch.no_grad()
    def set_half_lives(self, tokens: Float[Tensor, " h"]) -> None:
        dt = math.log(2) / tokens
        self.dt_proj.bias.copy_(dt.expm1().log().repeat_interleave(self.head_dim))
