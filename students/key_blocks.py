"""A chunk's queries against the many keys before it, block by block: the fastest kernels know no mask aligned at its end.

    y = sum over blocks of exp(l_b - l) y_b,   l = log sum exp(l_b)        (l_b: log of a block's sum of exponentials)

Keys before the chunk need no mask at all, and the chunk's own are a square. Blocks are a power of two times UNIT tokens and
contiguous, so that cuDNN, which plans every shape that it meets, meets few. PyTorch's FlashAttention 2, which does know the
mask, runs at 300 TFLOP/s on an H100 (head width 64), where whole prompts come to 425 (LOG.md).
"""

import logging
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from students.compat import cudnn_attention, flash_attention
from students.shapes import Float

UNIT = 1024  # tokens
LONGEST = 64  # units of a block, which is copied
WIDEST = 128  # channels of a head that cuDNN serves in every version
TOLERANCE = 2e-2  # of the trial, ||found - wanted|| / ||wanted|| in half precision

Part = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]  # q, k, v, scale, causal: y and its l

_log = logging.getLogger(__name__)


def serves(query: Float[Tensor, "b h t p"], key: Float[Tensor, "b kv s p"], value: Float[Tensor, "b kv s p"]) -> bool:
    """Whether blocks are worth it, and right, for these on their GPU: a small case is computed first, once a process."""
    time, behind = query.shape[2], key.shape[2] - query.shape[2]
    if time % UNIT or behind < time or value.shape[3] != query.shape[3] or query.shape[3] > WIDEST or query.shape[3] % 8:
        return False
    if not query.is_cuda or torch.cuda.get_device_capability(query.device)[0] < 9:
        return False
    return _trial(query.device, query.dtype, query.shape[3], query.shape[1] // key.shape[1])


def in_blocks(
    query: Float[Tensor, "b h t p"],
    key: Float[Tensor, "b kv s p"],
    value: Float[Tensor, "b kv s p"],
    scale: float,
    whole: Part = cudnn_attention,
    tail: Part = flash_attention,
) -> Float[Tensor, "b h t p"]:
    """Causal attention of queries that are the last of the keys.

    Args:
        whole: what computes blocks, those of a causal mask square. tail: what computes the end of the keys where they are
            more than the queries, under a mask aligned at its end.
    """
    time, keys = query.shape[2], key.shape[2]
    behind = (keys - time) // UNIT * UNIT
    own = whole if behind + time == keys else tail
    y, total = own(query, key[:, :, behind:].contiguous(), value[:, :, behind:].contiguous(), scale, True)
    total = total.reshape(*y.shape[:3], 1)
    for start, end in blocks(behind):
        part, log = whole(query, key[:, :, start:end].contiguous(), value[:, :, start:end].contiguous(), scale, False)
        log = log.reshape(total.shape)
        y = torch.lerp(y, part, (log - total).sigmoid().to(y.dtype))
        total = torch.logaddexp(total, log)
    return y


def blocks(tokens: int) -> Iterator[tuple[int, int]]:
    """Where blocks of keys begin and end, the longest first."""
    start = 0
    while start < tokens:
        units = min((tokens - start) // UNIT, LONGEST)
        size = UNIT << (units.bit_length() - 1)
        yield start, start + size
        start += size


@cache
def _trial(device: torch.device, dtype: torch.dtype, width: int, group: int) -> bool:
    draw = torch.Generator(device).manual_seed(0)
    heads = 2 * group
    sizes = ((heads, 2 * UNIT), (2, 5 * UNIT + 64), (2, 5 * UNIT + 64))
    try:
        q, k, v = (torch.randn(1, *size, width, generator=draw, device=device, dtype=dtype) for size in sizes)
        for keys in (5 * UNIT, 5 * UNIT + 64):
            k_part, v_part = k[:, :, :keys], v[:, :, :keys]
            wide = (part.float().repeat_interleave(heads // part.shape[1], 1) for part in (q, k_part, v_part))
            wide_q, wide_k, wide_v = wide
            wanted = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, causal_lower_right(2 * UNIT, keys))
            found = in_blocks(q, k_part, v_part, width**-0.5).float()
            if not (error := float((found - wanted).norm() / wanted.norm())) < TOLERANCE:
                raise RuntimeError(f"off by {error:.2%}")
    except torch.OutOfMemoryError:
        raise
    except Exception as reason:  # a library's or a driver's: whatever it is, FlashAttention serves
        _log.warning("keys in blocks fail their check on %s, so FlashAttention serves prompts: %s", device, reason)
        return False
    return True
