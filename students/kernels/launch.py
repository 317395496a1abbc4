"""What every Triton launch asks: the tile that holds a width, the precision of products, the device to launch on."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from students.kernels import is_on_paper

SMALLEST = 16  # tl.dot takes no narrower tile
MULTIPROCESSORS = 4  # assumed where there is no GPU, in the interpreter
HOPPER = 132  # likewise, on paper
SHARED_MEMORY = 227 * 1024  # likewise: a Hopper's


def tile(width: int) -> int:
    """The power of two that holds `width` channels, at least 16."""
    return max(SMALLEST, 1 << (width - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """How products of float32 tiles run: tf32 where PyTorch's own may, else three tf32 products that add up to float32."""
    allowed = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed or dtype != torch.float32 else "tf32x3"


def warps(elements: int, most: int) -> int:
    """The warps of a program that changes a tile in place: no more than have an element each. A tile that is smaller is held
    several times over, and one warp would read what another has changed already."""
    return min(most, max(1, elements // 32))


def on(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU the current one, which Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def multiprocessors(tensor: Tensor) -> int:
    """How many programs the tensor's device runs side by side, at least."""
    if not tensor.is_cuda:
        return HOPPER if is_on_paper() else MULTIPROCESSORS
    return _properties(tensor.device.index or 0).multi_processor_count


def shared_memory(tensor: Tensor) -> int:
    """Bytes of shared memory that a program may have on the tensor's device."""
    return _properties(tensor.device.index or 0).shared_memory_per_block_optin if tensor.is_cuda else SHARED_MEMORY


@cache
def _properties(index: int):
    return torch.cuda.get_device_properties(index)


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous, copied only where it is not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
