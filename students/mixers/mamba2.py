"""Stock Mamba-2 (arXiv 2405.21060, section 7), with the parametrisation and the parameter names of transformers.

    z, xBC, dt = in_proj(h)                     x, B, C = silu(conv(xBC))
    dt = softplus(dt + dt_bias)                 y = ssd(dt x, -dt exp(A_log), B, C) + D x
    out = out_proj(weight rms_norm(silu(z) y, over each group))

A student with this mixer exports exactly to transformers' classes, which other software runs already. Attention's output is
linear in its values, and no part of stock Mamba-2 is linear, so the start is a point where the mixer is almost linear:

  - a convolution tap of 0.25, where silu is almost a line;
  - dt near 1, the decays in A, and D = 0;
  - a gate that is constant on real inputs (W_z = 1.2785 w, where w is the least-squares solution of h w = 1);
  - with expand = 2, a companion head for each attention head, whose output is a constant (x from the convolution's bias,
    dt near 0, D = 1), so that the norm over the two divides by almost a constant.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from students.kernels.gated_norm import gated_norm
from students.mixers.entering import Entering, Entry
from students.mixers.mixer import Context, Matrix, Shape
from students.mixers.projections import least_squares
from students.mixers.starts import DT, OPEN_SILU, TAP
from students.mixers.state_space import StateSpace, StateSpaceParts, TokenInputs
from students.mixers.transfer import Projections, Transfer
from students.shapes import Float
from students.wrapped import Rows

COMPANION = 4.0  # the companion's constant, in units of the root mean square of its attention head's output
IDLE_DT = -10.0  # dt_bias of a companion: softplus gives 5e-5, nothing enters its state


class Mamba2(StateSpace):
    """Stock Mamba-2 with one SSM head for each attention head, and with expand = 2 a companion for each.

    Raises:
        ValueError: expand is neither 1 nor 2, or n_groups does not divide the number of attention heads.
    """

    float32 = frozenset({"A_log", "D", "dt_bias"})
    choices = {"expand": (1, 2)}
    meanings = StateSpace.meanings | {
        "expand": "SSM heads for each attention head. With 2, each has a companion head whose output starts constant.",
        "n_groups": "Number of groups of heads; a group shares B, C and a norm. Default: one group for each attention head.",
    }

    def __init__(
        self,
        shape: Shape,
        *,
        expand: int = 2,
        n_groups: int | None = None,
        d_state: int | None = None,
        d_conv: int = 4,
        lag: int = 0,
    ) -> None:
        super().__init__(shape, d_state, lag)
        n_heads = self.n_heads
        n_groups = n_heads if n_groups is None else n_groups
        if expand not in (1, 2):
            raise ValueError(f"expand must be 1 or 2 (a companion for each head), not {expand}")
        if n_heads % n_groups:
            raise ValueError(f"n_groups {n_groups} does not divide the {n_heads} attention heads")
        self.expand, self.n_groups = expand, n_groups
        self.heads = self.rows_after = expand * n_heads
        self.d_inner = self.heads * self.head_dim
        channels = self.d_inner + 2 * n_groups * self.d_state
        self.in_proj = nn.Linear(shape.d_model, self.d_inner + channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, bias=True)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.zeros(self.heads))
        self.norm = GroupNorm(self.d_inner, n_groups, self.norm_eps)
        self.out_proj = nn.Linear(self.d_inner, shape.d_model, bias=shape.o_bias)

    def project(self, h: Float[Tensor, "b t d"], context: Context) -> StateSpaceParts:
        rows = Rows(self.in_proj, h)
        raw = rows(self.d_inner, -self.heads)
        x, B, C = self._split(self.convolve(raw, self.conv1d, "silu", context))
        dt = F.softplus(rows.wide(-self.heads, None, self.dt_bias))
        v, k, q = self._split(raw)
        return StateSpaceParts(
            values=x,
            B=B,
            C=C,
            log_a=-dt * self.A_log.exp(),
            dt=dt,
            D=self.D,
            documents=context.documents,
            q=q,
            k=k,
            v=v[:, :, :: self.expand],
        )

    def entries(self) -> list[Entry]:
        z, x = Entry(self.in_proj, 0, self.d_inner), Entry(self.in_proj, self.d_inner, -self.heads)
        return [z, x, Entry(self.in_proj, -self.heads, None, wide=True)]

    def token_inputs(self, entering: Entering) -> TokenInputs:
        _, x, decay = (entering(entry) for entry in self.entries())
        return TokenInputs(x, decay, activation="silu", stock=(self.dt_bias, self.A_log))

    def token_end(self, y: Float[Tensor, "b 1 h p"], entering: Entering) -> Float[Tensor, "b 1 h p"]:
        return self.norm(y.flatten(2), entering(self.entries()[0])).unflatten(-1, (self.heads, -1))

    def lent(self, entering: Entering) -> tuple[Tensor, Tensor, Tensor]:
        v, k, q = self._split(entering(self.entries()[1]))
        return q[:, 0], k[:, 0], v[:, 0, :: self.expand]

    def _split(self, channels: Float[Tensor, "b t c"]) -> tuple[Tensor, Tensor, Tensor]:
        states = self.n_groups * self.d_state
        x, B, C = channels.split([self.d_inner, states, states], -1)
        return x.unflatten(-1, (self.heads, -1)), *(part.unflatten(-1, (self.n_groups, -1)) for part in (B, C))

    def features(self, y: Float[Tensor, "b t h p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h p"]:
        y = self.norm(y.flatten(2), Rows(self.in_proj, h)(0, self.d_inner))
        return y.unflatten(-1, (self.heads, -1))

    def out_weight(self) -> tuple[Float[Tensor, "h d p"], Float[Tensor, " d"] | None]:
        return self.out_proj.weight.unflatten(1, (self.heads, -1)).transpose(0, 1), self.out_proj.bias

    def semiseparable(self, parts: StateSpaceParts) -> Matrix:
        every = slice(None, None, self.expand)
        matrix = super().semiseparable(parts)
        return Matrix(
            matrix.C[:, :, every],
            matrix.B[:, :, every],
            matrix.log_a[:, :, every],
            None if matrix.D is None else matrix.D[every],
        )

    @torch.no_grad()
    def from_attention(self, attention: Projections) -> Transfer:
        transfer = Transfer(used={"o"})
        v, B, C, how = self.attention_rows(attention, self.n_groups, transfer)
        x = v.new_zeros(self.n_heads, self.expand, *v.shape[1:])
        x[:, 0] = v
        rows = torch.cat([x.flatten(0, 2), B.flatten(0, 1), C.flatten(0, 1)])
        self.in_proj.weight.zero_()
        self.in_proj.weight[self.d_inner : -self.heads] = rows[:, :-1]
        transfer.set("in_proj.weight", f"x copied from attention v, {how}; z and dt set to 0")
        self.set_taps("conv1d", TAP, transfer)
        self.get_parameter("conv1d.bias").copy_(TAP * rows[:, -1])
        transfer.set("conv1d.bias", f"attention q, k and v biases times {TAP}" if attention.biased else "set to 0")
        self._set_new_parameters(transfer)
        o = attention.o
        columns = o.new_zeros(o.shape[1], self.n_heads, self.expand, o.shape[2])
        columns[:, :, 0] = o.transpose(0, 1)
        self.out_proj.weight.copy_(columns.flatten(1))
        transfer.set("out_proj.weight", "copied from attention o" + ("; companions set to 0" * (self.expand - 1)))
        self.copy_output_bias(attention, transfer)
        return transfer

    def _set_new_parameters(self, transfer: Transfer) -> None:
        self.dt_bias.fill_(math.log(math.expm1(DT)))
        self.A_log.zero_()
        self.D.zero_()
        if self.expand == 2:
            self.dt_bias[1::2] = IDLE_DT
            self.D[1::2] = 1.0
        companions = "; companions {}" if self.expand == 2 else ""
        transfer.set("dt_bias", "set for dt = 1" + companions.format("for dt near 0"))
        transfer.set("D", "set to 0" + companions.format("to 1"))
        self.spread_memories("A_log", transfer)
        self.norm.weight.fill_(1.0)
        transfer.set("norm.weight", "set to 1")

    @torch.no_grad()
    def calibrate(self, h: Float[Tensor, "b t d"], transfer: Transfer) -> None:
        """Make the gate constant on these inputs, and set each companion's constant from the size of its head's output."""
        tokens = h.flatten(0, 1)
        w, residual = least_squares(tokens, tokens.new_ones(len(tokens), 1))
        self.in_proj.weight[: self.d_inner] = (OPEN_SILU * w[:, 0]).to(h.dtype)
        transfer.add("in_proj.weight", f"z a constant gate by least squares on real inputs (residual {residual:.1e})")
        if self.expand == 2:
            context = Context()
            y = self.mix(self.project(h, context), context)[:, :, ::2]
            size = COMPANION * y.square().mean((0, 1, 3)).sqrt()
            bias = self.get_parameter("conv1d.bias")[: self.d_inner].unflatten(0, (self.n_heads, 2, -1))
            bias[:, 1] = _inverse_silu(size)[:, None]
            transfer.add("conv1d.bias", f"companions {COMPANION:g} times their head's output on real inputs")

    @torch.no_grad()
    def set_half_lives(self, tokens: Float[Tensor, " h"]) -> None:
        self.A_log[:: self.expand] = (math.log(2) / DT / tokens).log()

    def head_terms(self) -> list[list[int]]:
        return [[head] for head in range(0, self.heads, self.expand)]

    @torch.no_grad()
    def rescale(self, factors: Float[Tensor, " h"]) -> None:
        self.norm.weight.mul_(factors.repeat_interleave(self.head_dim))


class GroupNorm(nn.Module):
    """The gate, then an RMSNorm over each group of channels."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight, self.groups, self.eps = nn.Parameter(torch.ones(size)), groups, eps

    def forward(self, y: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        return gated_norm(y, z, self.weight, self.groups, self.eps)


def _inverse_silu(y: Float[Tensor, " h"]) -> Float[Tensor, " h"]:
    """The positive x with silu(x) = y, for y > 0, by Newton's method."""
    x = y.double() + 0.5
    for _ in range(50):
        s = torch.sigmoid(x)
        x = x - (x * s - y) / (s * (1 + x * (1 - s)))
    return x.to(y.dtype)
