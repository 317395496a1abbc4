"""Causal attention of a chunk of queries to all earlier keys, block by block.

The fastest kernels have no causal mask that is aligned at the last key, so the chunk's attention is composed of blocks:

    y = sum over blocks of exp(l_b - l) y_b,   l = log sum exp(l_b)        (l_b: log of a block's sum of exponentials)

Blocks of keys before the chunk need no mask, and the chunk's own block is square. A block is contiguous and a power of two
times UNIT tokens long, so that cuDNN, which makes a plan for each shape, sees few shapes. PyTorch's FlashAttention 2 has
such a mask, but runs at 300 TFLOP/s on an H100 (head width 64), where whole prompts reach 425 (LOG.md).
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
LONGEST = 64  # units of the longest block; blocks are copied
WIDEST = 128  # channels of a head that cuDNN serves in every version
TOLERANCE = 2e-2  # of `_trial`: ||found - wanted|| / ||wanted|| in half precision

Part = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]  # (q, k, v, scale, causal) -> y and l

_log = logging.getLogger(__name__)


def serves(query: Float[Tensor, "b h t p"], key: Float[Tensor, "b kv s p"], value: Float[Tensor, "b kv s p"]) -> bool:
    """Whether blocks are faster for these shapes and correct on their GPU; a small case is checked once in a process."""
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
    """Causal attention of queries at the positions of the last keys.

    Args:
        whole: computes blocks without a mask, and square blocks under a causal mask. tail: computes the last block where it
            has more keys than queries, under a causal mask aligned at the last key.
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
    """The beginnings and ends of the blocks of keys, the longest first."""
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
    except Exception as reason:  # an error of a library or a driver: FlashAttention is used instead
        _log.warning("attention in blocks failed its check on %s; prompts use FlashAttention instead: %s", device, reason)
        return False
    return True
