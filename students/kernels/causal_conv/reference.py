"""The causal convolution in plain PyTorch, tap by tap."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from students.kernels.documents import runs as number_runs
from students.shapes import Float, Int


def causal_conv(
    x: Float[Tensor, "b t c"],
    weight: Float[Tensor, "c w"],
    bias: Float[Tensor, " c"] | None,
    activation: str | None,
    documents: Int[Tensor, "b t"] | None,
    initial: Float[Tensor, "b tail c"] | None,
) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b tail c"]]:
    """See `students.kernels.causal_conv.causal_conv`."""
    time, tail = x.shape[1], weight.shape[1] - 1
    weight = weight.to(x.dtype)
    padded = F.pad(x, (0, 0, tail, 0)) if initial is None else torch.cat([initial.to(x.dtype), x], 1)
    y = weight[:, tail] * x if bias is None else torch.addcmul(bias.to(x.dtype), weight[:, tail], x)
    for lag in range(1, tail + 1):
        y = torch.addcmul(y, weight[:, tail - lag], padded[:, tail - lag : tail - lag + time])
    last = padded[:, time:]
    if documents is not None:
        ids = number_runs(documents)
        ids = torch.cat([ids[:, :1].expand(-1, tail), ids], 1)
        y = _without_other_documents(y, padded, weight, ids)
        last = last * (ids[:, time:] == ids[:, -1:])[..., None]
    return F.silu(y) if activation == "silu" else y, last


def conv_token(
    x: Float[Tensor, "b c"],
    weight: Float[Tensor, "c w"],
    bias: Float[Tensor, " c"] | None,
    activation: str | None,
    ring: Float[Tensor, "b w c"],
    column: Int[Tensor, " 1"],
) -> Float[Tensor, "b c"]:
    """See `students.kernels.causal_conv.conv_token`."""
    weight, width = weight.to(x.dtype), weight.shape[1]
    ring.index_copy_(1, column % width, x[:, None].to(ring.dtype))
    y = weight[:, -1] * x if bias is None else torch.addcmul(bias.to(x.dtype), weight[:, -1], x)
    for lag in range(1, width):
        before = ring.index_select(1, (column - lag) % width)[:, 0].to(x.dtype)
        y = torch.addcmul(y, weight[:, width - 1 - lag], before)
    return F.silu(y) if activation == "silu" else y


def _without_other_documents(y: Tensor, padded: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Subtract the taps' contributions from other documents; only the few tokens near a boundary have any."""
    tail, time = weight.shape[1] - 1, y.shape[1]
    across = torch.stack([ids[:, tail - lag : tail - lag + time] != ids[:, tail:] for lag in range(1, tail + 1)], -1)
    row, place = across.any(-1).nonzero(as_tuple=True)
    if len(row) == 0:
        return y
    taken = sum(
        across[row, place, lag - 1, None] * weight[:, tail - lag] * padded[row, place + tail - lag]
        for lag in range(1, tail + 1)
    )
    return y.index_put((row, place), -cast(Tensor, taken), accumulate=True)
