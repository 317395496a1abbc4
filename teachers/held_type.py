"""In which type a teacher's numbers are held: its checkpoint's own, as far as that is one to compute in.

Half precision with five bits of exponent (float16) overflows where bfloat16 does not, and a quantised GGUF file has no type
of its own: both are held as bfloat16.
"""

from pathlib import Path
from typing import Literal

import torch

from teachers.files import stored_tensors

STORED = "stored"  # asks for the checkpoint's own type
HeldType = torch.dtype | Literal["stored"]
WIDE = ("F32", "F64")  # as safetensors calls them
NARROW = ("BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "BOOL")  # that bfloat16 holds as they are, or that are no weights


def held_type(location: str, gguf: Path | None = None) -> torch.dtype:
    """The type in which a checkpoint's numbers are held where its own is asked for.

    Args:
        location: a folder or a hub id. gguf: the file that the folder was made from.
    """
    if gguf is not None:
        return _of_gguf(gguf)
    stored = stored_tensors(location) or {}
    matrices = [tensor for tensor in stored.values() if len(tensor.shape) > 1] or list(stored.values())
    narrow = sum(tensor.size for tensor in matrices if tensor.dtype not in WIDE)
    return torch.bfloat16 if 2 * narrow > sum(tensor.size for tensor in matrices) else torch.float32


def loses_digits(location: str, dtype: torch.dtype) -> bool:
    """Whether a type has fewer digits than some number of a checkpoint may have."""
    if dtype.itemsize >= 4:
        return False
    stored = stored_tensors(location)
    return stored is None or any(tensor.dtype not in NARROW for tensor in stored.values())


def _of_gguf(path: Path) -> torch.dtype:
    """float32 only where every matrix of the file is."""
    from gguf import GGUFReader

    matrices = [tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1]
    return torch.float32 if all(tensor.tensor_type.name in WIDE for tensor in matrices) else torch.bfloat16
