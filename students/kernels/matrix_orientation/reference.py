"""The matrix orientation loss in PyTorch: one block of rows at a time, recomputed in the backward pass."""

from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from students.kernels.documents import runs as number_runs
from students.shapes import Float, Int

ROWS = 128  # least rows of a block; on a CPU, small blocks stay in the cache
ELEMENTS = 2**26  # elements of a block on a GPU, where launches would dominate the time of small blocks


def orientation_error(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t kv d"],
    C: Float[Tensor, "b t h n"],
    B: Float[Tensor, "b t h n"],
    log_a: Float[Tensor, "b t h"],
    D: Float[Tensor, " h"] | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    documents: Int[Tensor, "b t"] | None,
    min_lag: int,
) -> tuple[Float[Tensor, "b h"], Float[Tensor, "b h"]]:
    """See `students.kernels.matrix_orientation.orientation_error`. Extra memory: a few blocks."""
    dtype = torch.promote_types(C.dtype, torch.float32)
    time = q.shape[1]
    ids = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device) if documents is None else number_runs(documents)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    q, k, C, B = (part.to(dtype).transpose(1, 2) for part in (q.detach(), k.detach(), C, B))  # [b h t .]
    total = log_a.to(dtype).cumsum(1).transpose(1, 2)  # [b h t]
    D = C.new_zeros(C.shape[1]) if D is None else D.to(dtype)

    def block(start: int, stop: int, C, B, total, D):
        rows = torch.arange(start, stop, device=q.device)
        columns = torch.arange(stop, device=q.device)
        lag = rows[:, None] - columns
        within = (lag >= 0) & (ids[:, start:stop, None] == ids[:, None, :stop])  # [b rows columns]
        within = within[:, None]
        A = _attention(q[:, :, start:stop], k[:, :, :stop], within, lag, scale, softcap, window)
        decay = (total[:, :, start:stop, None] - total[:, :, None, :stop]).masked_fill(~within, -torch.inf).exp()
        M = decay * (C[:, :, start:stop] @ B[:, :, :stop].transpose(2, 3)) + D[:, None, None] * (lag == 0)
        counted = lag >= min_lag
        return ((A - M) * counted).square().sum((2, 3)), (A * counted).square().sum((2, 3))

    error: Tensor | float = 0.0
    power: Tensor | float = 0.0
    rows = max(ROWS, ELEMENTS // (q.shape[0] * q.shape[1] * time)) if q.is_cuda else ROWS
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, time, rows):
            stop = min(start + rows, time)
            block_error, block_power = checkpoint(
                block, start, stop, C, B, total, D, use_reentrant=False, preserve_rng_state=False
            )
            error, power = error + block_error, power + block_power.detach()
    return cast(Tensor, error), cast(Tensor, power)


def _attention(q, k, within, lag, scale, softcap, window):
    logits = (q @ k.transpose(2, 3)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if window is not None:
        within = within & (lag < window)
    return logits.masked_fill(~within, -torch.inf).softmax(-1)
