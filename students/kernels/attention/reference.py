"""Attention on PyTorch's own kernels: one masked call, or for long sequences blocks as wide as the window.

cuDNN's kernel is not used: PyTorch 2.11 caches its compiled backward pass by the layout of q, k and v, but not by that of
the output's gradient. If that layout changes, gradients are wrong or invalid memory is read (LOG.md, 27 Nov 2026).
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from students.shapes import Bool, Float, Int

BLOCK = 64  # least width of a block of queries in the windowed form
SAFE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s kv d"],
    v: Float[Tensor, "b s kv_p p"],
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: int,
    documents: Int[Tensor, "b s"] | None,
    positions: Int[Tensor, "b s"] | None,
) -> Float[Tensor, "b t h p"]:
    """See `students.kernels.attention.attention`."""
    k, v = (part.repeat_interleave(q.shape[2] // part.shape[2], 2) for part in (k, v))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [b h . .]
    time, keys = q.shape[2], k.shape[2]
    width = max(window or 0, BLOCK)
    if window is not None and keys == time and time > 2 * width:
        y = _blocked(q, k, v, scale, softcap, window, sinks, documents, positions, width)
    elif window is None and documents is None and keys == time and softcap is None:
        with sdpa_kernel(SAFE):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        index = torch.arange(keys, device=q.device)
        visible = visible_to(index[keys - time :], index, window, documents, positions, sinks)
        y = _attend(q, k, v, visible, scale, softcap)
    return y.transpose(1, 2)


def attend_places(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s kv d"],
    v: Float[Tensor, "b s kv p"],
    scale: float,
    softcap: float | None,
    last: Int[Tensor, " 1"] | None,
    window: int | None,
    start: Int[Tensor, " b"] | None,
    mask: Bool[Tensor, "b s"] | Int[Tensor, "b s"] | None,
    document: Int[Tensor, " b"] | None,
    new: tuple[Float[Tensor, "b t kv d"], Float[Tensor, "b t kv p"]] | None = None,
) -> Float[Tensor, "b t h p"]:
    """See `students.kernels.attention.attend_places`. The heads of one key head are the rows of one product."""
    time, group, places = q.shape[1], q.shape[2] // k.shape[2], k.shape[1]
    columns = torch.arange(places, device=q.device)
    newest = places - 1 if last is None else last
    columns = newest - (newest - columns) % places  # the column at each place
    own = newest - torch.arange(time - 1, -1, -1, device=q.device)
    for part, latest in zip((k, v), new or (), strict=False):
        part.index_copy_(1, own % places, latest.to(part.dtype))
    visible = ((columns >= 0) & (columns <= own[:, None]))[None]
    if window is not None:
        visible = visible & (columns > own[:, None] - window)
    if start is not None:
        visible = visible & (columns >= start[:, None])[:, None]
    if mask is not None:
        visible = visible & (mask.bool() if document is None else mask == document[:, None])[:, None]
    q = q.unflatten(2, (-1, group)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [b kv t*g d]
    k, v = (part.transpose(1, 2).to(q.dtype) for part in (k, v))
    y = _attend(q, k, v, visible.repeat_interleave(group, 1), scale, softcap)
    y = y.masked_fill(~visible.any(2).repeat_interleave(group, 1)[:, None, :, None], 0.0)
    return y.unflatten(2, (time, group)).permute(0, 2, 1, 3, 4).flatten(2, 3)


def visible_to(
    rows: Tensor, columns: Tensor, window: int | None, documents: Tensor | None, positions: Tensor | None, sinks: int
) -> Bool[Tensor, "b t s"]:
    """Returns which tokens `columns` each token `rows` sees; b is 1 if the mask is the same for all sequences."""
    lag = rows[:, None] - columns
    visible = (lag >= 0)[None]
    if window is not None:
        near = (lag < window)[None]
        if sinks:
            assert positions is not None, "sinks are known by their positions"
            near = near | (positions[:, columns] < sinks)[:, None]
        visible = visible & near
    if documents is not None:
        visible = visible & (documents[:, rows, None] == documents[:, None, columns])
    return visible


def _attend(q, k, v, visible, scale, softcap) -> Tensor:
    """Compute masked attention; a query that sees no key (padding) returns zero or a mean, never NaN."""
    if softcap is None:
        with sdpa_kernel(SAFE):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], scale=scale)
    logits = softcap * torch.tanh((q @ k.transpose(2, 3)) * scale / softcap)
    weights = logits.float().masked_fill(~visible[:, None], torch.finfo(torch.float32).min).softmax(-1)
    return weights.to(v.dtype) @ v


def _blocked(q, k, v, scale, softcap, window, sinks, documents, positions, width) -> Tensor:
    """Compute windowed attention in blocks of `width` queries over the block itself, the one before, and the sinks.

    Only the document at the start of the block before can have sinks further back, so `sinks` extra keys are enough.
    """
    batch, heads, time, _ = q.shape
    blocks = -(-time // width)
    pad = blocks * width - time
    if documents is None:
        documents = torch.zeros(batch, time, dtype=torch.long, device=q.device)
        positions = torch.arange(time, device=q.device).expand(batch, -1)
    elif not sinks:  # positions are not used
        positions = torch.zeros_like(documents)
    documents = F.pad(documents, (width, pad), value=torch.iinfo(documents.dtype).min)
    positions = F.pad(positions, (width, pad), value=sinks)
    k, v = (F.pad(part, (0, 0, width, pad)) for part in (k, v))
    q = F.pad(q, (0, 0, 0, pad)).unflatten(2, (blocks, width))  # [b h z w d]

    index = torch.arange(blocks, device=q.device)[:, None] * width + torch.arange(2 * width, device=q.device)  # [z 2w]
    rows = index[:, width:]
    if sinks:
        start = (index[:, :1] - positions[:, index[:, 0]][..., None]) + torch.arange(sinks, device=q.device)  # [b z s]
        far = (start >= width) & (start < index[:, :1])
        start = start.clamp(0, (blocks + 1) * width - 1)
        columns = torch.cat([start, index.expand(batch, -1, -1)], 2)  # [b z s+2w]
    else:
        columns = index.expand(batch, -1, -1)
    take = columns.flatten(1)
    k, v = (
        part.gather(2, take[:, None, :, None].expand(-1, heads, -1, part.shape[3])).unflatten(2, (blocks, -1))
        for part in (k, v)
    )
    documents_at, positions_at = (part.gather(1, take).unflatten(1, (blocks, -1)) for part in (documents, positions))
    lag = rows[None, :, :, None] - columns[:, :, None]  # [b z w s+2w]
    near = (lag >= 0) & ((lag < window) | (positions_at < sinks)[:, :, None])
    visible = near & (documents[:, rows][..., None] == documents_at[:, :, None])
    if sinks:
        visible = torch.cat([visible[..., :sinks] & far[:, :, None], visible[..., sinks:]], 3)
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))  # blocks become batch rows
    y = _attend(q, k, v, visible.flatten(0, 1), scale, softcap)
    return y.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :time]
