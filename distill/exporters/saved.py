"""A saved student's tensors, read one at a time, and shards written one at a time: no model needs to fit in memory."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5 * 10**9  # bytes of a file of weights, at most, unless one tensor is larger


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a folder as `save_pretrained` writes it, in one file or in shards; each is read when it is asked for,
    in float32.

    Raises:
        ValueError: no weights, or an index that names none. SafetensorError, OSError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._open, self._file_of = {}, {}
        for file in _files(folder):
            opened = safe_open(file, "pt")
            self._open[file] = opened
            self._file_of |= dict.fromkeys(opened.keys(), file)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's, without reading it."""
        return tuple(self._open[self._file_of[name]].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        return self._open[self._file_of[name]].get_tensor(name).float()

    def __contains__(self, name: object) -> bool:  # the base class would read it
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        raise ValueError(f"there is neither {WEIGHTS} nor {INDEX}")
    table = json.loads((folder / INDEX).read_text()).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ValueError(f"{INDEX} has no weight_map")
    return [folder / Path(name).name for name in sorted(set(table.values()))]


def write_weights(
    out: Path,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    dtype: Callable[[str], torch.dtype],
) -> None:
    """Write tensors as `save_pretrained` would: one file, or shards with an index, each made when its turn comes.

    Args:
        sizes: numbers in each tensor. dtype: of a tensor by its name.
    """
    bytes_of = {name: count * dtype(name).itemsize for name, count in sizes.items()}
    shards = [[]]
    for name, size in bytes_of.items():
        if shards[-1] and sum(bytes_of[other] for other in shards[-1]) + size > SHARD:
            shards.append([])
        shards[-1].append(name)
    names = [WEIGHTS] if len(shards) == 1 else [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in _counted(shards)]
    for file, shard in zip(names, shards, strict=True):
        save_file(_held(tensors, shard, dtype), out / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = {"total_parameters": sum(sizes.values()), "total_size": sum(bytes_of.values())}
        table = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        (out / INDEX).write_text(json.dumps({"metadata": total, "weight_map": table}, indent=2, sort_keys=True) + "\n")


def _held(tensors: Mapping[str, Tensor], names: list[str], dtype: Callable[[str], torch.dtype]) -> dict[str, Tensor]:
    """These tensors in memory, each its own: safetensors refuses two that are one."""
    held, places = {}, set()
    for name in names:
        tensor = tensors[name].to(dtype(name)).contiguous()
        held[name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    return held


def _counted(shards: list) -> range:
    return range(1, len(shards) + 1)
