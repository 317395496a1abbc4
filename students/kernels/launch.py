"""Launch parameters that the Triton kernels share: tile widths, the precision of products, the device and its limits."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from students.kernels import is_on_paper

SMALLEST = 16  # tl.dot takes no narrower tile
MULTIPROCESSORS = 4  # assumed without a GPU, in the interpreter
HOPPER = 132  # multiprocessors assumed inside `on_paper`: an H100's
SHARED_MEMORY = 227 * 1024  # bytes assumed without a GPU: an H100's


def tile(width: int) -> int:
    """Returns the smallest power of two that holds `width` channels, at least 16."""
    return max(SMALLEST, 1 << (width - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """Returns the precision of float32 products: tf32 if PyTorch's setting allows it, else three tf32 products (tf32x3)."""
    allowed = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed or dtype != torch.float32 else "tf32x3"


def warps(elements: int, most: int) -> int:
    """Returns the warps of a program that changes a tile in place: at most one for every 32 elements.

    Triton replicates a smaller tile over the warps, and one warp could read elements that another has already changed.
    """
    return min(most, max(1, elements // 32))


def on(tensor: Tensor) -> AbstractContextManager:
    """Inside the block, the tensor's GPU is the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def multiprocessors(tensor: Tensor) -> int:
    """Returns the number of multiprocessors of the tensor's device, which all run programs at the same time."""
    if not tensor.is_cuda:
        return HOPPER if is_on_paper() else MULTIPROCESSORS
    return _properties(tensor.device.index or 0).multi_processor_count


def shared_memory(tensor: Tensor) -> int:
    """Returns the bytes of shared memory that a program may use on the tensor's device."""
    return _properties(tensor.device.index or 0).shared_memory_per_block_optin if tensor.is_cuda else SHARED_MEMORY


@cache
def _properties(index: int):
    return torch.cuda.get_device_properties(index)


def rows_of(tensor: Tensor) -> Tensor:
    """Returns the tensor with its last dimension contiguous; it is copied only if it is not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
