"""The one-token step of attention over a ring in plain PyTorch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from students.kernels.attention import attend_places
from students.kernels.heads import qk_norm, rotated
from students.shapes import Float, Int

if TYPE_CHECKING:
    from students.kernels.window_token import Keys, Norms


def window_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: "Keys",
    column: Tensor,
    dtype: torch.dtype,
    scale: float,
    softcap: float | None,
    rope: tuple[Tensor, Tensor, str] | None,
    norms: "Norms | None",
    factors: Tensor | None,
    reads: Sequence[int] | None,
    share: Tensor | None = None,
) -> Tensor:
    """See `students.kernels.window_token.window_token`."""
    if norms is not None:
        q, k = (qk_norm(part, weight, norms.kind, norms.eps) for part, weight in ((q, norms.q), (k, norms.k)))
    if rope is not None:
        q, k = (rotated(part, *rope) for part in (q, k))
    size = keys.k.shape[1]
    if keys.sinks is not None:
        _keep_sink(keys, column)
    for ring, part in ((keys.k, k), (keys.v, v)):
        ring.index_copy_(1, column % size, part[:, None].to(ring.dtype))
    q = q.to(keys.k.dtype)
    if keys.sinks is None:
        where = {"last": column, "window": keys.window, "start": -keys.offset}
        y = attend(q, keys.k, keys.v, scale, softcap, reads, **where)
    else:
        held, values, positions = held_positions(keys, column)
        y = attend(q, held, values, scale, softcap, reads, mask=positions >= 0)
    y = y if factors is None else y * factors.to(y.dtype)[:, None]
    return (y if share is None else y * (2 * (-share).to(y.dtype).sigmoid())[..., None]).to(dtype)


def held_positions(keys: "Keys", column: Tensor) -> tuple[Tensor, Tensor, Int[Tensor, "b s"]]:
    """Returns all cached keys, values and positions, sinks first; places without a token of the document are negative."""
    current = (keys.offset + column)[:, None]
    age = (column - torch.arange(keys.k.shape[1], device=column.device)) % keys.k.shape[1]
    positions = current - age
    if keys.sinks is None:
        return keys.k, keys.v, positions
    assert keys.window is not None, "sinks are of a window"
    slots = torch.arange(keys.sinks[0].shape[1], device=column.device)[None]
    slots = torch.where(slots <= current - keys.window, slots, -1)
    k, v = (torch.cat([sink, ring], 1) for sink, ring in zip(keys.sinks, (keys.k, keys.v), strict=True))
    return k, v, torch.cat([slots, positions.masked_fill(positions <= current - keys.window, -1)], 1)


def attend(
    q: Float[Tensor, "b h p"],
    k: Float[Tensor, "b s kv p"],
    v: Float[Tensor, "b s kv p"],
    scale: float,
    softcap: float | None,
    reads: Sequence[int] | None = None,
    **where: Any,
) -> Float[Tensor, "b h p"]:
    """Compute attention of one query per head over the keys that it sees; `where`: see `attend_places`."""
    if reads is not None:  # indexing by a list would make the GPU wait for the CPU
        k, v = (torch.stack([part[:, :, head] for head in reads], 2) for part in (k, v))
    return attend_places(q[:, None], k, v, scale=scale, softcap=softcap, **where)[:, 0]


def _keep_sink(keys, column: Tensor) -> None:
    """Copy the token that leaves the window to the sinks if it is one of the first tokens."""
    size = keys.k.shape[1]
    place = (column + 1) % size if size > keys.window else column % size
    leaves = keys.offset + column - keys.window
    slots = torch.arange(keys.sinks[0].shape[1], device=column.device)
    fits = (slots == leaves[:, None])[..., None, None]
    for sink, ring in zip(keys.sinks, (keys.k, keys.v), strict=True):
        sink.copy_(torch.where(fits, ring.index_select(1, place), sink))
