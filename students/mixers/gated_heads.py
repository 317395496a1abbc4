"""Base of retention and GLA, with all that surrounds the exchange between tokens: projections, head norms, a swish gate.

    v, k, q = in_proj(h)                                no convolution, no activation
    out = out_proj(weight rms_norm(y, each head) silu(gate_proj(h)))

Attention's projections are copied. The norm removes the size of each head's output, so its weight takes the output scale.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from students.mixers.mixer import Shape
from students.mixers.projections import rms_norm
from students.mixers.recurrent import Recurrent
from students.mixers.starts import OPEN_SILU, constant_row
from students.mixers.transfer import Projections, Transfer
from students.shapes import Float


class GatedHeads(Recurrent):
    """Base of mixers with one head for each attention head. A subclass implements `mix`, and `set_decays` for its own
    parameters."""

    copied = ("in_proj", "out_proj")

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.norm_eps = shape.norm_eps
        width = self.n_heads * self.head_dim
        self.in_proj = nn.Linear(shape.d_model, 3 * width, bias=shape.qkv_bias)
        self.gate_proj = nn.Linear(shape.d_model, width, bias=False)
        self.norm = nn.Parameter(torch.ones(self.n_heads, self.head_dim))
        self.out_proj = nn.Linear(width, shape.d_model, bias=shape.o_bias)

    def heads(self, h: Float[Tensor, "b t d"]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each [b t h p]."""
        v, k, q = (part.unflatten(-1, (self.n_heads, -1)) for part in self.in_proj(h).chunk(3, -1))
        return q, k, v

    def features(self, y: Float[Tensor, "b t h p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h p"]:
        gate = F.silu(self.gate_proj(h)).unflatten(-1, (self.n_heads, -1))
        return rms_norm(y, self.norm_eps) * self.norm.to(y.dtype) * gate

    @torch.no_grad()
    def from_attention(self, attention: Projections) -> Transfer:
        transfer = Transfer()
        heads = self.head_rows(attention, transfer)
        rows = torch.cat([heads[name].flatten(0, 1) for name in "vkq"])
        self.in_proj.weight.copy_(rows[:, :-1])
        folded = "" if attention.q_norm is None else ", the weights of the norms on q and k folded in"
        transfer.set("in_proj.weight", f"copied from attention v, k and q, softmax scale in q{folded}")
        if self.in_proj.bias is not None:
            self.in_proj.bias.copy_(rows[:, -1])
            transfer.set("in_proj.bias", "copied from attention q, k and v biases")
        self.gate_proj.weight.zero_()
        transfer.set("gate_proj.weight", "set to 0: a gate that calibration opens")
        self.norm.fill_(1.0)
        transfer.set("norm", "set to 1")
        self.set_decays(heads["k"][..., :-1], transfer)
        self.copy_output(attention, transfer)
        return transfer

    def set_decays(self, k: Float[Tensor, "h p d"], transfer: Transfer) -> None:
        """Set the parameters of the decays, and record their sources. k: the copied key projection."""
        raise NotImplementedError

    @torch.no_grad()
    def calibrate(self, h: Float[Tensor, "b t d"], transfer: Transfer) -> None:
        """Open the gate on these inputs."""
        w, residual = constant_row(h)
        self.gate_proj.weight.copy_((OPEN_SILU * w).expand_as(self.gate_proj.weight))
        transfer.set("gate_proj.weight", f"a constant gate by least squares on real inputs (residual {residual:.1e})")

    @torch.no_grad()
    def rescale(self, factors: Float[Tensor, " h"]) -> None:
        self.norm.mul_(factors[:, None])
