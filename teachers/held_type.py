"""The type of a teacher's weights in memory when the checkpoint's own is asked for: float32 or bfloat16.

float16, with five bits of exponent, overflows at values that bfloat16 holds, and a quantised GGUF file has no type to
compute in: the weights of both are loaded as bfloat16.
"""

from pathlib import Path
from typing import Literal

import torch

from teachers.files import stored_tensors

STORED = "stored"  # asks for the checkpoint's own type
HeldType = torch.dtype | Literal["stored"]
WIDE = ("F32", "F64")  # as safetensors calls them
NARROW = ("BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "BOOL")  # bfloat16 holds them exactly, or they are no weights


def held_type(location: str, gguf: Path | None = None) -> torch.dtype:
    """Returns the type that "stored" means for a checkpoint: bfloat16 if most of its values are narrower than float32.

    Args:
        location: a folder or a hub id. gguf: the GGUF file that the folder was converted from, if any.
    """
    if gguf is not None:
        return _of_gguf(gguf)
    stored = stored_tensors(location) or {}
    matrices = [tensor for tensor in stored.values() if len(tensor.shape) > 1] or list(stored.values())
    narrow = sum(tensor.size for tensor in matrices if tensor.dtype not in WIDE)
    return torch.bfloat16 if 2 * narrow > sum(tensor.size for tensor in matrices) else torch.float32


def loses_digits(location: str, dtype: torch.dtype) -> bool:
    """Returns whether `dtype` may hold fewer digits than the checkpoint's numbers have."""
    if dtype.itemsize >= 4:
        return False
    stored = stored_tensors(location)
    return stored is None or any(tensor.dtype not in NARROW for tensor in stored.values())


def _of_gguf(path: Path) -> torch.dtype:
    """Returns float32 if every matrix of the file is float32 or float64, otherwise bfloat16."""
    from gguf import GGUFReader

    matrices = [tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1]
    return torch.float32 if all(tensor.tensor_type.name in WIDE for tensor in matrices) else torch.bfloat16
