"""A saved student's tensors, read and written one at a time: no model needs to fit in memory."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from distill.exporters.weights import aligned, write_file
from teachers.files import INDEX, WHOLE, weight_files

SHARD = 5 * 10**9  # the most bytes of a weight file, unless one tensor is larger


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a `save_pretrained` folder (one file or shards), each read on access and returned in float32.

    Raises:
        ValueError: the folder has no weights. SafetensorError, OSError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._open: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        files = weight_files(folder)
        if not files:
            raise ValueError(f"there is neither {WHOLE} nor {INDEX}")
        for file in files:
            opened = safe_open(file, "pt")
            self._open[file] = opened
            self._file_of |= dict.fromkeys(opened.keys(), file)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading the tensor."""
        return tuple(self._open[self._file_of[name]].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        return self._open[self._file_of[name]].get_tensor(name).float()

    def __contains__(self, name: object) -> bool:  # the base class would read the tensor
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def write_weights(
    out: Path,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    dtype: Callable[[str], torch.dtype],
) -> None:
    """Write tensors as `save_pretrained` does: one file, or shards with an index. One tensor is in memory at a time.

    Args:
        shapes: each tensor's shape, by name. dtype: returns a tensor's type for its name.
    """
    numbers = {name: math.prod(shape) for name, shape in shapes.items()}
    bytes_of = {name: count * dtype(name).itemsize for name, count in numbers.items()}
    shards: list[list[str]] = [[]]
    for name, size in bytes_of.items():
        if shards[-1] and sum(bytes_of[other] for other in shards[-1]) + size > SHARD:
            shards.append([])
        shards[-1].append(name)
    count = len(shards)
    files = [WHOLE] if count == 1 else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    for file, shard in zip(files, shards, strict=True):
        sizes = aligned({name: (dtype(name), shapes[name]) for name in shard})
        write_file(out / file, sizes, ((name, tensors[name].to(dtype(name))) for name in sizes))
    if count > 1:
        total = {"total_parameters": sum(numbers.values()), "total_size": sum(bytes_of.values())}
        table = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        (out / INDEX).write_text(json.dumps({"metadata": total, "weight_map": table}, indent=2, sort_keys=True) + "\n")
