"""The contents of a model's safetensors files, read from their headers: names, shapes and types, no values."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # in the order in which transformers looks for them


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `dtype` is safetensors' name of the type: "F32", "BF16", "F8_E4M3", "U8" ..."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """The number of values."""
        return prod(self.shape)


def folder_of(location: str) -> Path | None:
    """Returns the folder with the files of a folder or of a hub id; None if they were not downloaded."""
    if Path(location).is_dir():
        return Path(location)
    config = try_to_load_from_cache(location, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def stored_tensors(location: str) -> dict[str, Stored] | None:
    """Returns every tensor of the files that transformers reads; None if they are not safetensors, or cannot be read."""
    folder = folder_of(location)
    if folder is None:
        return None
    try:
        return {name: tensor for file in weight_files(folder) for name, tensor in _headers(file).items()} or None
    except (OSError, ValueError, SafetensorError):
        return None  # transformers raises the error when it loads them


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files that transformers reads in a folder: `model.safetensors`, or else those of the index."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if not (folder / INDEX).is_file():
        return []
    return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]


def _headers(file: Path) -> dict[str, Stored]:
    with safe_open(file, "pt") as opened:
        parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is no mapping
        return {name: Stored(tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
