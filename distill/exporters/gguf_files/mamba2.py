"""Stock Mamba-2 in llama.cpp's form, padded with zeros to the sizes that llama.cpp takes.

    z, x, B, C, dt = in_proj(h)        conv over x, B, C        A = -exp(A_log)

Two sizes are padded with zeros, exactly:

  - Heads, where an architecture fixes the inner width. Added heads make groups of their own, so that no norm is taken over
    old and new channels together. Their x is silu(0) = 0 and their D is 0, so their output and its norm are 0. Their columns
    of out_proj are 0 as well.
  - Channels of B and C, because llama.cpp's GPU scans take 128 or 256 of them. Added channels are silu(0) = 0 in B and in C,
    so their state is never written or read.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.exporters.gguf_files.architecture import Entry, Taken

if TYPE_CHECKING:
    from transformers import PretrainedConfig

STATES = (128, 256)  # channels of B and C that GPU scans take (CUDA also takes 96, Vulkan does not)
NO_LIMIT = 1e30  # a limit of the time step from here on means none, for configs that cannot hold infinity


@dataclass(frozen=True)
class Mamba2:
    """The sizes of a Mamba-2 mixer: hidden channels, SSM heads and their channels, groups and their states, taps."""

    hidden: int
    heads: int
    head_dim: int
    groups: int
    states: int
    taps: int

    @classmethod
    def of(cls, config: "PretrainedConfig") -> "Mamba2":
        """Read the sizes from a config whose entries begin with `mamba_`."""
        sizes = (config.mamba_n_heads, config.mamba_d_head, config.mamba_n_groups, config.mamba_d_state)
        return cls(config.hidden_size, *sizes, config.mamba_d_conv)

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution."""
        return self.inner + 2 * self.groups * self.states

    def padded(self, inner: int | None = None) -> "Mamba2":
        """Return the sizes with zeros. inner: the inner width, where the architecture fixes it.

        Raises:
            ValueError: whole groups do not fill that width.
        """
        states = next((states for states in STATES if states >= self.states), self.states)
        if inner is None:
            return replace(self, states=states)
        groups, over = divmod(inner * self.groups, self.inner)
        if over or groups < self.groups:
            raise ValueError(
                f"llama.cpp needs an inner width of {inner}, and {self.inner} channels in {self.groups} groups cannot be "
                "filled up to it"
            )
        return replace(self, states=states, groups=groups, heads=self.heads // self.groups * groups)

    def entries(self) -> dict[str, Entry]:
        return {
            "ssm.conv_kernel": self.taps,
            "ssm.inner_size": self.inner,
            "ssm.state_size": self.states,
            "ssm.time_step_rank": self.heads,
            "ssm.group_count": self.groups,
        }


def reasons(config: "PretrainedConfig") -> list[str]:
    """Return what llama.cpp would leave out of a mixer."""
    found = []
    if config.mamba_proj_bias:
        found.append("llama.cpp has no bias in Mamba-2's projections (mamba_proj_bias)")
    low, high = config.time_step_limit
    if low > 0 or high < NO_LIMIT:
        found.append(f"llama.cpp has no limits of the time step ({low}, {high})")
    return found


def mixer(taken: Taken, prefix: str, own: Mamba2, wanted: Mamba2) -> dict[str, Tensor]:
    """Return the tensors of a mixer, filled up with zeros to the sizes `wanted`."""
    rows = own.inner + own.channels + own.heads
    z, xbc, dt = taken(f"{prefix}.in_proj.weight", rows, own.hidden).split([own.inner, own.channels, own.heads])
    bias = f"{prefix}.conv1d.bias"
    taps = taken(f"{prefix}.conv1d.weight", own.channels, 1, own.taps)[:, 0]
    shift = taken(bias, own.channels) if bias in taken else taps.new_zeros(own.channels)  # llama.cpp always adds a bias
    found = {
        "ssm_in.weight": torch.cat([_longer(z, wanted.inner), _channels(xbc, own, wanted), _longer(dt, wanted.heads)]),
        "ssm_conv1d.weight": _channels(taps, own, wanted),
        "ssm_conv1d.bias": _channels(shift, own, wanted),
        "ssm_dt.bias": _longer(taken(f"{prefix}.dt_bias", own.heads), wanted.heads),
        "ssm_a": -_longer(taken(f"{prefix}.A_log", own.heads), wanted.heads).exp()[:, None],
        "ssm_d": _longer(taken(f"{prefix}.D", own.heads), wanted.heads)[:, None],
        "ssm_out.weight": _longer(taken(f"{prefix}.out_proj.weight", own.hidden, own.inner).T, wanted.inner).T,
    }
    if (norm := f"{prefix}.norm.weight") in taken:
        found["ssm_norm.weight"] = _longer(taken(norm, own.inner), wanted.inner).unflatten(0, (wanted.groups, -1))
    return found


def _channels(tensor: Tensor, own: Mamba2, wanted: Mamba2) -> Tensor:
    """Fill x, B and C up with zeros along the first dimension, each to its wanted size."""
    x, *states = tensor.split([own.inner, own.groups * own.states, own.groups * own.states])
    longer = [_longer(x, wanted.inner)]
    for part in states:
        by_group = part.unflatten(0, (own.groups, own.states))
        by_group = _longer(by_group.transpose(0, 1), wanted.states).transpose(0, 1)
        longer.append(_longer(by_group, wanted.groups).flatten(0, 1))
    return torch.cat(longer)


def _longer(tensor: Tensor, length: int) -> Tensor:
    """Append zeros up to a length of the first dimension."""
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])
