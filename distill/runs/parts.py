"""Files of a checkpoint that several processes wrote: each writes its own rows of divided tensors, without gathering.

student-00001-of-00004.safetensors     rows of the student's divided tensors, by name; optimizer-... likewise
rng-00001-of-00004.safetensors         that process's random states
parts-00001-of-00004.json              the whole shape and first row of each tensor in these files; each file's hash

Undivided tensors are in student.safetensors and the other files, as in a checkpoint of one process. Every file is
safetensors or JSON, so reading one cannot run code.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.disk import file_hash
from distill.reading import read_json
from distill.runs.records import Record, Whole

MOST = 64 * 2**20  # bytes of a list of parts
NUMBERED = r"-\d{5}-of-\d{5}"  # in the name of a file that one of several processes wrote


@dataclass(frozen=True)
class Part:
    """Some rows of a tensor. start: the number of the first. shape: that of the whole tensor."""

    rows: Tensor
    start: int
    shape: tuple[int, ...]


class _Place(Record):
    model_config = ConfigDict(extra="forbid")

    shape: list[Whole]
    start: Whole
    rows: Whole


class _List(Record):
    """The content of a list of parts (parts-....json)."""

    model_config = ConfigDict(extra="forbid")

    tensors: dict[Annotated[str, Field(pattern=r"^\w+$")], dict[str, _Place]]
    files: dict[Annotated[str, Field(pattern=rf"^\w+{NUMBERED}\.safetensors$")], str]


LIST = TypeAdapter(_List)


def numbered(name: str, which: int, world: int) -> str:
    """The name of a file of process `which` (from 0) among `world`."""
    stem, dot, kind = name.partition(".")
    return f"{stem}-{which + 1:05d}-of-{world:05d}{dot}{kind}"


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a file of tensors. Returns its hash."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
    sync(file)
    return file_hash(file)


def write_parts(
    folder: Path, which: int, world: int, groups: Mapping[str, Mapping[str, Part]], rng: Mapping[str, Tensor]
) -> None:
    """Write one process's parts, its random states, and the list of them.

    Args:
        groups: by file ("student", "optimizer"), each a mapping from names.
    """
    places: dict[str, dict] = {}
    files: dict[str, str] = {}
    for name, parts in groups.items():
        if parts:
            file = folder / numbered(f"{name}.safetensors", which, world)
            files[file.name] = write_tensors(file, {key: part.rows for key, part in parts.items()})
            places[name] = {
                key: {"shape": list(part.shape), "start": part.start, "rows": part.rows.shape[0]}
                for key, part in parts.items()
            }
    file = folder / numbered("rng.safetensors", which, world)
    files[file.name] = write_tensors(file, rng)
    listed = folder / numbered("parts.json", which, world)
    listed.write_text(json.dumps({"tensors": places, "files": files}))
    sync(listed)


def written(folder: Path, world: int) -> dict[str, str]:
    """The hashes of all files that `world` processes wrote, including their lists."""
    found: dict[str, str] = {}
    for which in range(world):
        listed = folder / numbered("parts.json", which, world)
        found |= read_json(listed, LIST, fix="it is left out", most=MOST)["files"]
        found[listed.name] = file_hash(listed)
    return found


class Stored(Mapping[str, Tensor]):
    """The tensors of one group of a checkpoint, by name. Each is read on access and joined from its parts."""

    def __init__(self, checkpoint: Path, group: str) -> None:
        """
        Raises:
            UserError: a list of parts is damaged. ValueError: parts do not make up their tensors.
        """
        self._whole: dict[str, Any] = {}
        self._parts: dict[str, Any] = {}
        file = checkpoint / f"{group}.safetensors"
        if file.exists():
            opened = safe_open(file, "pt")
            self._whole = dict.fromkeys(opened.keys(), opened)
        for listed in sorted(checkpoint.glob("parts-*-of-*.json")):
            places = read_json(listed, LIST, fix="delete the checkpoint", most=MOST)["tensors"].get(group)
            if places:
                opened = safe_open(
                    checkpoint / listed.name.replace("parts", group, 1).replace(".json", ".safetensors"), "pt"
                )
                for name, place in places.items():
                    self._parts.setdefault(name, []).append((place, opened))
        for name, parts in self._parts.items():
            _check(name, [place for place, _ in parts])

    def __iter__(self) -> Iterator[str]:
        yield from self._whole
        yield from (name for name in self._parts if name not in self._whole)

    def __len__(self) -> int:
        return len(self._whole.keys() | self._parts.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name in self._whole:
            return self._whole[name].get_tensor(name)
        return torch.cat([opened.get_tensor(name) for _, opened in self._parts[name]])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor; no others are read."""
        if name in self._whole:
            return self._whole[name].get_slice(name)[start:stop]
        found = []
        for place, opened in self._parts[name]:
            first, last = max(start, place["start"]), min(stop, place["start"] + place["rows"])
            if first < last:
                found.append(opened.get_slice(name)[first - place["start"] : last - place["start"]])
        return torch.cat(found) if found else self._parts[name][0][1].get_tensor(name)[:0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a whole tensor."""
        if name in self._whole:
            return tuple(self._whole[name].get_slice(name).get_shape())
        return tuple(self._parts[name][0][0]["shape"])


def _check(name: str, places: list[dict]) -> None:
    """Refuse parts with missing or repeated rows."""
    shape, next_row = places[0]["shape"], 0
    for place in places:
        if place["shape"] != shape or (place["rows"] and place["start"] != next_row):
            raise ValueError(f"the parts of {name} do not belong together")
        next_row += place["rows"]
    if next_row != shape[0]:
        raise ValueError(f"the parts of {name} hold {next_row} of its {shape[0]} rows")


def sync(path: Path) -> None:
    """Flush a file or folder to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
