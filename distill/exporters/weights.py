"""Weights written in another type, one tensor in memory at a time.

The format of a safetensors file: eight bytes with the length of a JSON header, the header with each tensor's type, shape and
place, and the numbers one after the other (https://github.com/huggingface/safetensors).
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from teachers.files import INDEX, WHOLE

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ALIGNED = 8  # bytes to which the header's length is filled up


def files_of(folder: Path) -> list[Path]:
    """The weight files of a model's folder, in order: one, or those that its index names."""
    if (folder / WHOLE).exists():
        return [folder / WHOLE]
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    return [folder / name for name in sorted(set(places.values()))]


def write_cast(source: Path, out: Path, type_of: Callable[[str], torch.dtype]) -> int:
    """Write the weights of a folder into another in types of one's own, in files of the same names.

    Args:
        source: the folder with the weights; may be `out` itself. type_of: the type of a tensor by its name.

    Returns:
        the bytes of all tensors.

    Raises:
        OSError: they cannot be written.
    """
    total = 0
    for file in files_of(source):
        with safe_open(file, "pt") as opened:
            kinds = {name: type_of(name) for name in opened.keys()}  # noqa: SIM118, it is no mapping
            names = sorted(kinds, key=lambda name: (-kinds[name].itemsize, name))  # so that every tensor is aligned
            shapes = {name: opened.get_slice(name).get_shape() for name in names}
            tensors = ((name, opened.get_tensor(name).to(kinds[name])) for name in names)
            half = out / f".{file.name}"
            total += write_file(half, {name: (kinds[name], shapes[name]) for name in names}, tensors)
        half.replace(out / file.name)
    if (source / INDEX).exists() and not (source / WHOLE).exists():
        index = json.loads((source / INDEX).read_text())
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total


def write_file(
    file: Path, sizes: Mapping[str, tuple[torch.dtype, Iterable[int]]], tensors: Iterable[tuple[str, Tensor]]
) -> int:
    """Write one safetensors file whose tensors come one by one.

    Args:
        sizes: type and shape of each, in the order in which they come.

    Returns:
        the bytes of the tensors.

    Raises:
        OSError: it cannot be written. ValueError: a tensor is not as announced.
    """
    header, end = dict(_header(sizes)), 0
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for (name, tensor), (announced, entry) in zip(tensors, header.items(), strict=True):
            begin, end = entry["data_offsets"]
            if name != announced or list(tensor.shape) != entry["shape"] or tensor.nbytes != end - begin:
                raise ValueError(f"{file.name}: {name} is not the tensor that its header announces")
            opened.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return end


def _header(sizes: Mapping[str, tuple[torch.dtype, Iterable[int]]]) -> Iterator[tuple[str, dict]]:
    begin = 0
    for name, (kind, shape) in sizes.items():
        shape = list(shape)
        end = begin + prod(shape) * kind.itemsize
        yield name, {"dtype": TYPES[kind], "shape": shape, "data_offsets": [begin, end]}
        begin = end
