"""Writing of a GGUF file, tensor by tensor, with the package gguf."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from distill.errors import UserError

LARGEST = torch.finfo(torch.float16).max
FILE_TYPES = {torch.float32: 0, torch.float16: 1}  # llama.cpp's numbers for general.file_type
MISSING = "GGUF files are written by the package gguf, which is not installed; pip install 'distill-hybrids[gguf]'"


def check_installed() -> None:
    """Check that the package gguf is installed.

    Raises:
        UserError: with the command that installs it.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(MISSING) from error


def write_file(
    path: Path,
    architecture: str,
    entries: Mapping[str, Any],
    tensors: Callable[[], Iterator[tuple[str, Tensor]]],
    dtype: torch.dtype,
    float32: Callable[[str, Tensor], bool],
) -> None:
    """Write a GGUF file.

    A matrix with a value beyond float16's range stays in float32, so that nothing becomes infinite.

    Args:
        entries: by their full names. tensors: yields the tensors in float32; it is called twice, for their sizes and for
            their values, so that at most one layer is in memory. dtype: of the matrices. float32: whether a tensor stays in
            float32.

    Raises:
        ValueError: a tensor is not finite. OSError: the file cannot be written.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    written = {**entries, "general.file_type": FILE_TYPES[dtype], "general.quantization_version": gguf.GGML_QUANT_VERSION}
    for name, value in written.items():
        _add(writer, name, value)
    types = {}
    for name, tensor in tensors():
        types[name] = _type(name, tensor, torch.float32 if float32(name, tensor) else dtype)
        kind = numpy.dtype(str(types[name]).removeprefix("torch."))
        writer.add_tensor_info(name, tuple(tensor.shape), kind, tensor.numel() * kind.itemsize)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors():
            writer.write_tensor_data(tensor.to(types[name]).contiguous().numpy())
    finally:
        writer.close()


def _type(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the type that a tensor is written in."""
    largest = tensor.abs().max().item()
    if not largest < float("inf"):
        raise ValueError(f"the tensor {name} holds a value that is not finite")
    return torch.float32 if dtype == torch.float16 and largest > LARGEST else dtype


def _add(writer: Any, name: str, value: Any) -> None:
    """Add one entry in the type that llama.cpp reads."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
