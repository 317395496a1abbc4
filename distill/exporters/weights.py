"""Safetensors files written in another type, with one tensor in memory at a time.

The format of a safetensors file: eight bytes with the length of a JSON header, the header with each tensor's type, shape and
offsets, then the bytes of the tensors (https://github.com/huggingface/safetensors).
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from teachers.files import INDEX, WHOLE, weight_files

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ALIGNED = 8  # the header is padded to a multiple of this many bytes
Size = tuple[torch.dtype, Iterable[int]]  # of a tensor: its type and its shape


def write_cast(source: Path, out: Path, type_of: Callable[[str], torch.dtype]) -> int:
    """Write the weights of a folder into another folder in given types, under the same file names.

    Args:
        source: the folder with the weights; may be `out` itself. type_of: the type of a tensor by its name.

    Returns:
        the bytes of all tensors.

    Raises:
        OSError: they cannot be written.
    """
    total = 0
    for file in weight_files(source):
        with safe_open(file, "pt") as opened:
            kinds = {name: type_of(name) for name in opened.keys()}  # noqa: SIM118, it is no mapping
            sizes = aligned({name: (kinds[name], opened.get_slice(name).get_shape()) for name in kinds})
            half = out / f".{file.name}"
            total += write_file(half, sizes, ((name, opened.get_tensor(name).to(kinds[name])) for name in sizes))
        half.replace(out / file.name)
    if (source / INDEX).exists() and not (source / WHOLE).exists():
        index = json.loads((source / INDEX).read_text())
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total


def aligned(sizes: Mapping[str, Size]) -> dict[str, Size]:
    """Sort tensors by type and name, so that every tensor starts at a multiple of its item size in a file."""
    return dict(sorted(sizes.items(), key=lambda item: (-item[1][0].itemsize, item[0])))


def write_file(file: Path, sizes: Mapping[str, Size], tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write one safetensors file from tensors that are passed one by one.

    Args:
        sizes: type and shape of each tensor, in the order of `tensors`.

    Returns:
        the bytes of the tensors.

    Raises:
        OSError: the file cannot be written. ValueError: a tensor differs from its entry in `sizes`.
    """
    header, end = dict(_header(sizes)), 0
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for (name, tensor), (announced, entry) in zip(tensors, header.items(), strict=True):
            begin, end = entry["data_offsets"]
            if name != announced or list(tensor.shape) != entry["shape"] or tensor.nbytes != end - begin:
                raise ValueError(f"{file.name}: {name} is not the tensor that the header describes")
            opened.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return end


def _header(sizes: Mapping[str, Size]) -> Iterator[tuple[str, dict]]:
    begin = 0
    for name, (kind, shape) in sizes.items():
        shape = list(shape)
        end = begin + prod(shape) * kind.itemsize
        yield name, {"dtype": TYPES[kind], "shape": shape, "data_offsets": [begin, end]}
        begin = end
