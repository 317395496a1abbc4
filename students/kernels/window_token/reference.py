"""One token of attention on a ring in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from students.shapes import Bool, Float, Int

SAFE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def window_token(q, k, v, keys, column, dtype, scale, softcap, rope, norms, factors, reads) -> Tensor:
    """See `students.kernels.window_token.window_token`."""
    if norms is not None:
        q, k = (_normed(part, weight, norms.kind, norms.eps) for part, weight in ((q, norms.q), (k, norms.k)))
    if rope is not None:
        q, k = (rotated(part, *rope) for part in (q, k))
    size = keys.k.shape[1]
    if keys.sinks is not None:
        _keep_sink(keys, column)
    for ring, part in ((keys.k, k), (keys.v, v)):
        ring.index_copy_(1, column % size, part[:, None].to(ring.dtype))
    held, values, positions = held_positions(keys, column)
    y = attend(q, held, values, _seen(keys, positions, column), scale, softcap, reads)
    return (y if factors is None else y * factors.to(y.dtype)[:, None]).to(dtype)


def held_positions(keys, column: Tensor) -> tuple[Tensor, Tensor, Int[Tensor, "b s"]]:
    """Everything that is kept, sinks first: keys, values and positions, negative where there is nothing of the document."""
    current = (keys.offset + column)[:, None]
    age = (column - torch.arange(keys.k.shape[1], device=column.device)) % keys.k.shape[1]
    positions = current - age
    if keys.sinks is None:
        return keys.k, keys.v, positions
    slots = torch.arange(keys.sinks[0].shape[1], device=column.device)[None]
    slots = torch.where(slots <= current - keys.window, slots, -1)
    k, v = (torch.cat([sink, ring], 1) for sink, ring in zip(keys.sinks, (keys.k, keys.v), strict=True))
    return k, v, torch.cat([slots, positions.masked_fill(positions <= current - keys.window, -1)], 1)


def _seen(keys, positions: Tensor, column: Tensor) -> Bool[Tensor, "b s"]:
    visible = positions >= 0
    if keys.window is not None and keys.sinks is None:
        visible = visible & (positions > (keys.offset + column)[:, None] - keys.window)
    return visible


def attend(
    q: Float[Tensor, "b h p"],
    k: Float[Tensor, "b s kv p"],
    v: Float[Tensor, "b s kv p"],
    visible: Bool[Tensor, "b s"],
    scale: float,
    softcap: float | None,
    reads=None,
) -> Float[Tensor, "b h p"]:
    """One query a head over the keys that it sees."""
    if reads is not None:  # indexed by a list, a GPU would wait for the CPU
        k, v = (torch.stack([part[:, :, head] for head in reads], 2) for part in (k, v))
    k, v = (part.to(q.dtype).transpose(1, 2).repeat_interleave(q.shape[1] // k.shape[2], 1) for part in (k, v))
    if softcap is None:
        with sdpa_kernel(SAFE):
            return F.scaled_dot_product_attention(q[:, :, None], k, v, visible[:, None, None], scale=scale)[:, :, 0]
    logits = softcap * torch.tanh((q[:, :, None] @ k.transpose(2, 3)) * scale / softcap)
    wide = torch.promote_types(logits.dtype, torch.float32)
    weights = logits.to(wide).masked_fill(~visible[:, None, None], torch.finfo(wide).min).softmax(-1)
    return (weights.to(v.dtype) @ v)[:, :, 0]


def rotated(x: Float[Tensor, "b h p"], cos: Tensor, sin: Tensor, kind: str) -> Float[Tensor, "b h p"]:
    """Rotary embedding of one token; kind: see `Shape.rope`."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if kind == "pairs":
        across = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        across = torch.cat([-second, first], -1)
    turned = turned * cos + across * sin
    return torch.cat([turned, kept], -1) if kept.shape[-1] else turned


def _normed(x: Tensor, weight: Tensor, kind: str, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    power = wide.square().mean((-2, -1) if kind == "rms_wide" else -1, keepdim=True)
    return (wide * torch.rsqrt(power + eps) * weight.to(wide.dtype)).to(x.dtype)


def _keep_sink(keys, column: Tensor) -> None:
    """The token that leaves the window goes to the sinks where it is one of the first."""
    size = keys.k.shape[1]
    place = (column + 1) % size if size > keys.window else column % size
    leaves = keys.offset + column - keys.window
    slots = torch.arange(keys.sinks[0].shape[1], device=column.device)
    fits = (slots == leaves[:, None])[..., None, None]
    for sink, ring in zip(keys.sinks, (keys.k, keys.v), strict=True):
        sink.copy_(torch.where(fits, ring.index_select(1, place), sink))
