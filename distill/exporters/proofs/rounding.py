"""The check that a published folder is the exact export, rounded: the same config, every tensor rounded to the nearest."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from distill.errors import UserError, shown

TYPES = ("dtype", "torch_dtype")


def check_rounded(published: Path, exact: Path, dtype: str) -> None:
    """Compare a folder with the same export in float32.

    Args:
        dtype: of the published weights, except those that stay in float32.

    Raises:
        UserError: the first tensor or entry that differs.
    """
    _check_config(published, exact)
    found, wanted = _files(published), _files(exact)
    if names := sorted(set(found) ^ set(wanted)):
        raise UserError(f"the export and the same in float32 do not have the same tensors: only one of them has {names[0]}")
    for name, tensor in _tensors(exact):
        with safe_open(found[name], "pt") as file:
            rounded = file.get_tensor(name)
        if rounded.dtype not in (torch.float32, getattr(torch, dtype)) and tensor.is_floating_point():
            raise UserError(f"{name} of the export is {rounded.dtype}, but it should be {dtype} or float32")
        if rounded.shape != tensor.shape:
            raise UserError(f"{name} of the export has the shape {list(rounded.shape)}; it should be {list(tensor.shape)}")
        near = tensor.to(rounded.dtype)
        if not torch.equal(near, rounded):
            place = tuple(torch.nonzero(near != rounded)[0].tolist())
            raise UserError(
                f"{name} of the export is not the student's, rounded to {dtype}: at {list(place)} it is "
                f"{rounded[place].item():.6g}, but it should be {near[place].item():.6g}"
            )


def _check_config(published: Path, exact: Path) -> None:
    found, wanted = (json.loads((folder / "config.json").read_text()) for folder in (published, exact))
    for name in sorted({*found, *wanted} - set(TYPES)):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"config.json of the export has {name} {shown(found.get(name))}, but that of the same in float32 has "
                f"{shown(wanted.get(name))}"
            )


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a folder, one at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
