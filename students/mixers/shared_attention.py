"""Attention whose projections several layers share (Zamba, arXiv 2405.16712; Zamba2, arXiv 2411.15242).

    q, k, v, o at site i = (shared W + up_i down_i) x

A site is a layer that uses the shared block. One block of projections is used at many depths (Zamba), or two blocks
alternate (Zamba2). Each site may correct the block by a low-rank delta. The layers of one letter share: with `blocks: 2`,
its first, third ... layers use one block, and its second, fourth ... layers the other. Each site has its own biases, norms
on q and k, head scales, and keys and values in a cache. The block is a module of its first site, and the other sites hold a
reference. It is therefore saved, counted and trained once, by gradients summed over the sites.

A block starts as the mean of its layers' projections, or as the projections of the most central layer. Each delta is the
truncated singular value decomposition of the difference, and the transfer record says how much of a projection's power is
left out. Heads are not matched between layers. Differences from both papers: only attention is shared, each layer keeps its
own MLP, and the input is the layer's hidden state without the embedding.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from students.mixers.attention import Attention
from students.mixers.mixer import Mixer, Shape
from students.mixers.transfer import Projections, Transfer
from students.shapes import Float
from students.wrapped import is_plain

STARTS = ("mean", "central")
PROJECTIONS = ("q", "k", "v", "o")


class SiteLinear(nn.Module):
    """A linear map that sites share, with one site's low-rank delta and bias.

    Args:
        rank: of the delta, at most the smaller of the two sizes; 0 for no delta.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.out_features = outputs
        self.shared = nn.Linear(inputs, outputs, bias=False)
        self._owner = (self,)  # in a tuple, so that the owner does not become a submodule
        rank = min(rank, inputs, outputs)
        self.down = nn.Parameter(torch.zeros(rank, inputs)) if rank else None
        self.up = nn.Parameter(torch.zeros(outputs, rank)) if rank else None
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def tie(self, owner: "SiteLinear") -> None:
        """Use another site's shared map from now on.

        Raises:
            ValueError: the map has another size.
        """
        if owner.base.shape != self.base.shape:
            raise ValueError(f"layers with projections of {[*owner.base.shape]} and {[*self.base.shape]} share no attention")
        self._owner = owner._owner
        if hasattr(self, "shared"):
            del self.shared

    @property
    def base(self) -> Float[Tensor, "out in"]:
        """The shared weight, of the owner's module."""
        return cast(Tensor, self._map.weight)

    @property
    def _map(self) -> nn.Module:
        """The shared map, looked up in the owner at each call, because an adapter may have replaced it there."""
        return self._owner[0].shared

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The site's whole weight: the shared weight plus the delta."""
        return self.base if self.up is None or self.down is None else self.base + self.up @ self.down

    def forward(self, x: Float[Tensor, "b t in"]) -> Float[Tensor, "b t out"]:
        if is_plain(self._map):
            y = F.linear(x, self.base, self.bias)
        else:
            y = self._map(x)
            y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y if self.up is None or self.down is None else y + F.linear(F.linear(x, self.down), self.up)


class SharedAttention(Attention):
    """One site of a shared attention block.

    Raises:
        ValueError: `start` is unknown.
    """

    shares = True
    copied = tuple(f"{name}_proj" for name in PROJECTIONS)
    zero_options = Attention.zero_options | {"rank"}
    choices = {"start": STARTS}
    meanings = {name: Attention.meanings[name] for name in ("window", "sinks", "rope")} | {
        "blocks": "Number of attention blocks that the layers of this letter use alternately.",
        "rank": "Rank of the delta by which each layer corrects its block; 0 for no delta.",
        "start": "Start of a block: the mean of its layers' projections, or those of the most central layer.",
    }

    def __init__(
        self,
        shape: Shape,
        *,
        blocks: int = 1,
        rank: int = 16,
        start: str = "mean",
        window: int | None = None,
        sinks: int = 0,
        rope: bool | None = None,
    ) -> None:
        if start not in STARTS:
            raise ValueError(f"shared_attention: start is {start!r}; it is one of {', '.join(STARTS)}")
        super().__init__(shape, window=window, sinks=sinks, rope=rope)
        self.start, self.blocks = start, blocks
        for name in PROJECTIONS:
            plain = getattr(self, f"{name}_proj")
            site = SiteLinear(plain.in_features, plain.out_features, rank, plain.bias is not None)
            setattr(self, f"{name}_proj", site)

    def tie(self, owner: Mixer) -> None:
        for name in PROJECTIONS:
            getattr(self, f"{name}_proj").tie(getattr(owner, f"{name}_proj"))

    def from_attention(self, attention: Projections) -> Transfer:
        return self.from_attentions([self], [attention])[0]

    @classmethod
    @torch.no_grad()
    def from_attentions(cls, sites: Sequence[Mixer], attentions: Sequence[Projections]) -> list[Transfer]:
        matrices = {name: [_matrix(name, getattr(each, name)) for each in attentions] for name in PROJECTIONS}
        own_sites = cast(Sequence[SharedAttention], sites)
        center = _most_central(matrices) if own_sites[0].start == "central" else None
        transfers = [site._copy_own(attention) for site, attention in zip(own_sites, attentions, strict=True)]
        for name, own in matrices.items():
            base = torch.stack(own).mean(0) if center is None else own[center]
            getattr(sites[0], f"{name}_proj").base.copy_(base)
            whose = "the mean" if center is None else f"number {center + 1}"
            transfers[0].set(f"{name}_proj.shared.weight", f"{whose} of attention {name} in {len(own)} layers")
            for site, transfer, matrix in zip(own_sites, transfers, own, strict=True):
                site._fit_delta(name, matrix, transfer)
        return transfers

    def _copy_own(self, attention: Projections) -> Transfer:
        """Set the parameters that are not shared: scale, norms and biases."""
        transfer = Transfer()
        self.scale.fill_(1.0)
        transfer.set("scale", "set to 1")
        for name in ("q_norm", "k_norm") if self.qk_norm else ():
            getattr(self, name).copy_(getattr(attention, name))
            transfer.set(name, f"copied from attention {name}")
            transfer.used.add(name)
        for name in PROJECTIONS:
            bias, given = getattr(self, f"{name}_proj").bias, getattr(attention, f"{name}_bias")
            if bias is None:
                continue
            bias.copy_(torch.zeros_like(bias) if given is None else given.flatten())
            transfer.set(f"{name}_proj.bias", "set to 0" if given is None else f"copied from attention {name} bias")
            transfer.used |= set() if given is None else {f"{name}_bias"}
        return transfer

    def _fit_delta(self, name: str, matrix: Float[Tensor, "out in"], transfer: Transfer) -> None:
        """Set the site's delta by truncated SVD.

        `down` has orthonormal rows and `up` has the singular values, so `up` gets a gradient also where the difference is 0.
        """
        site = getattr(self, f"{name}_proj")
        transfer.used.add(name)
        wide = torch.promote_types(matrix.dtype, torch.float32)  # there is no SVD in half precision
        left, power = matrix.to(wide) - site.base.to(wide), matrix.to(wide).square().sum()
        if site.up is None:
            share = (left.square().sum() / power).item()
            transfer.set(f"({name} left out)", f"{share:.1%} of the power of attention {name}: no delta")
            return
        u, s, vh = torch.linalg.svd(left, full_matrices=False)
        rank = len(site.down)
        site.down.copy_(vh[:rank])
        site.up.copy_(u[:, :rank] * s[:rank])
        share = (s[rank:].square().sum() / power).item()
        how = f"rank-{rank} SVD of the difference of attention {name} from the shared block"
        transfer.set(f"{name}_proj.down", how)
        transfer.set(f"{name}_proj.up", f"{how}; {share:.1%} of the power of {name} left out")


def _matrix(name: str, weight: Tensor) -> Float[Tensor, "out in"]:
    """The weight of a linear layer, from a projection that is stored head by head."""
    return weight.transpose(0, 1).flatten(1) if name == "o" else weight.flatten(0, 1)


def _most_central(matrices: dict[str, list[Tensor]]) -> int:
    """The layer whose projections are closest to all others', by squared distances relative to each projection's power."""
    sums: Tensor | float = 0.0
    for own in matrices.values():
        stack = torch.stack(own).flatten(1).double()
        sums = sums + torch.cdist(stack, stack).square().sum(1) / stack.square().sum()
    return int(cast(Tensor, sums).argmin())
