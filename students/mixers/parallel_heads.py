"""Hymba's block (arXiv 2411.13676, section 2.1): attention heads and SSM heads in parallel on the same input.

    out = (W_ssm (beta_ssm norm(SSM)) + W_attention (beta_attention norm(attention))) / 2

norm is an RMSNorm over all channels of a branch, and beta is a learned factor for each channel. A difference from Hymba:
each branch has its own output projection, a copy of attention's o, where Hymba ties the two.

The norm removes the size of each token's output, and teachers have no norm here. To keep the copied function, calibration
gives each SSM head the size of its attention head, and beta the mean size of the attention's output on real inputs. The two
branches then start as the mean of two approximations of the same attention. The least squares over heads that follows
(`rescale`) changes beta.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from students.mixers import has_own_window, make_mixer
from students.mixers.attention import Attention
from students.mixers.branches import Branches
from students.mixers.mixer import Context, Mixer, Shape
from students.mixers.projections import rms_norm
from students.mixers.starts import SSM
from students.mixers.transfer import Projections, Transfer
from students.shapes import Float


class ParallelHeads(Branches):
    """Attention heads and SSM heads in parallel on one input.

    Raises:
        ValueError: `ssm` names no SSM mixer, or one with attention.
    """

    beside = "attention"
    zero_options = frozenset({"sinks"})
    meanings = {name: Attention.meanings[name] for name in ("window", "share_kv")} | {
        "sinks": "Number of first tokens of a document that the attention always sees too, meta tokens included.",
        "ssm": "The mixer of the SSM heads and its options. Default: `{mixer: discrete_mamba2}`.",
        "norm": "Normalise each branch before the two are added.",
    }

    def __init__(
        self,
        shape: Shape,
        *,
        ssm: dict | None = None,
        window: int | None = None,
        sinks: int = 0,
        share_kv: bool = False,
        norm: bool = True,
    ) -> None:
        attention = Attention(replace(shape, o_bias=False), window=window, sinks=sinks, share_kv=share_kv)
        super().__init__(_make_ssm(shape, SSM if ssm is None else ssm), attention)
        if window is not None and (shape.window is None or window < shape.window):
            self.min_lag = max(self.min_lag, window)
        self.norm_eps = shape.norm_eps if norm else None
        self.beta = nn.Parameter(torch.ones(len(self.ssm.out_weight()[0]) + shape.n_heads, shape.head_dim))

    joins = True

    def joined(self, features: Float[Tensor, "b t k p"], h: Float[Tensor, "b t d"]) -> Float[Tensor, "b t k p"]:
        if self.norm_eps is not None:
            features = torch.cat([rms_norm(part.flatten(2), self.norm_eps) for part in self.split(features)], 2)
            features = features.unflatten(2, self.beta.shape)
        return features * (self.beta / 2).to(features.dtype)

    @torch.no_grad()
    def from_attention(self, attention: Projections) -> Transfer:
        transfer = super().from_attention(attention)
        self.beta.fill_(1.0)
        transfer.set("beta", "set to 1")
        return transfer

    @torch.no_grad()
    def calibrate(self, h: Float[Tensor, "b t d"], transfer: Transfer) -> None:
        """Scale the branches to one size on these inputs, without rotation; the least squares correct the rest.

        An attention that reads another layer's keys cannot be run on one layer's inputs alone. Every size is then 1.
        """
        super().calibrate(h, transfer)
        context = Context.unrotated(h, self.exact.head_dim)
        found = _size(_features(self.ssm, h, context))
        wanted = found.new_ones(self.exact.n_heads) if self.exact.share_kv else _size(_features(self.exact, h, context))
        terms = [terms[0] for terms in self.ssm.head_terms()]
        ratios = wanted / found[terms].clamp_min(1e-12)
        factors = ratios.mean().repeat(len(found))
        factors[terms] = ratios
        self.ssm.rescale(factors)
        self.beta.fill_(wanted.square().mean().sqrt() if self.norm_eps is not None else 1.0)
        whose = "1" if self.exact.share_kv else f"{self.beta[0, 0]:.3g}, the attention's mean size on real inputs"
        transfer.set("beta", f"set to {whose}; SSM heads made as large as their attention heads")

    @torch.no_grad()
    def rescale(self, factors: Float[Tensor, " k"]) -> None:
        self.beta.mul_(factors[:, None])


def _make_ssm(shape: Shape, options: dict) -> Mixer:
    options = dict(options)
    name = options.pop("mixer", None)
    if not isinstance(name, str):
        raise ValueError(f"the ssm of parallel_heads names no mixer: {options}; write ssm: {{mixer: discrete_mamba2}}")
    if has_own_window(name) or "window" in options:
        raise ValueError(f"the ssm of parallel_heads is {name}, which has attention; name an SSM mixer without a window")
    return make_mixer(name, shape, options)


def _features(branch: Mixer, h: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t k p"]:
    return branch.features(branch.mix(branch.project(h, context), context), h)


def _size(y: Float[Tensor, "b t k p"]) -> Float[Tensor, " k"]:
    """The root mean square of each term."""
    return y.square().mean((0, 1, 3)).sqrt()
