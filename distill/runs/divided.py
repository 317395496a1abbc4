"""Checkpoints of a student and optimizer that are divided over processes: saved by all, restored by any number."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill import moments
from distill.errors import UserError
from distill.runs import checkpoint, parts
from distill.runs.parts import Part, Stored
from distill.runs.together import all_or_none


def save_together(
    folder: Path,
    state: checkpoint.RunState,
    tensors: checkpoint.Groups,
    held: Mapping[str, Mapping[str, Part]],
    keep: int,
    device: torch.device,
) -> None:
    """Save a checkpoint as `checkpoint.save`, by all processes: each writes its rows, and the first writes the rest.

    Args:
        tensors: the undivided ones, read on the first process only, except "rng", which each process writes. held: by file,
            this process's rows of divided tensors. device: that of the collective operations.

    Raises:
        UserError: as `save`, on all processes if one of them could not write.
    """
    which, world = dist.get_rank(), dist.get_world_size()
    scratch = folder / f"{checkpoint.SCRATCH}{state.place}"

    def write() -> None:
        with checkpoint.written(scratch.parent / state.place, None):
            parts.write_parts(scratch, which, world, held, tensors["rng"])

    try:
        all_or_none((lambda: checkpoint.begin(folder, state)) if which == 0 else None, device)
        all_or_none(write, device)
        end = lambda: checkpoint.end(folder, scratch, state, tensors, keep, parts.written(scratch, world))  # noqa: E731
        all_or_none(end if which == 0 else None, device)
    except UserError:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


@runtime_checkable
class Optimizer(Protocol):
    """The part of an optimizer's interface that saving uses."""

    @property
    def state(self) -> Mapping[Any, dict[str, Any]]:
        """Its tensors, by parameter and name."""
        ...

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The options that it was made with."""
        ...


def optimizer_tensors(optimizer: Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, with 8-bit moments as plain tensors.

    names: maps id(parameter) to the parameter's name."""
    return {
        f"{names[id(parameter)]}|{key}": _as_parameter(parameter, value) if moments.by_rows(key) else value
        for parameter, entries in optimizer.state.items()
        for key, value in moments.plain(entries).items()
    }


def _as_parameter(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """State rows of a parameter as a tensor that is divided like the parameter."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    shape = (parameter.shape[0], *value.shape[1:])
    strides = torch.empty(shape, device="meta").stride()
    where = parameter.device_mesh, parameter.placements
    return DTensor.from_local(value, *where, run_check=False, shape=torch.Size(shape), stride=strides)


def load_optimizer(optimizer: Optimizer, parameters: dict[str, nn.Parameter], tensors: Stored) -> None:
    """Restore the optimizer's state; for a divided parameter, this process's rows.

    Raises:
        ValueError: a tensor has a wrong shape or type.
    """
    if optimizer.state:
        _fill(optimizer, parameters, tensors)
        return
    for name in tensors:
        parameter_name, _, key = name.rpartition("|")
        parameter = parameters[parameter_name]
        if isinstance(parameter, DTensor) and key != "step":
            optimizer.state[parameter][key] = _held_again(parameter, name, tensors)
            continue
        tensor = tensors[name]
        on_device = tensor if key == "step" and not optimizer.defaults.get("fused") else tensor.to(parameter.device)
        optimizer.state[parameter][key] = on_device


def _fill(optimizer: Optimizer, parameters: dict[str, nn.Parameter], tensors: Stored) -> None:
    """Restore the state of an optimizer that has state tensors already."""
    begun = {id(parameter): moments.plain(entries) for parameter, entries in optimizer.state.items()}
    for name in tensors:
        parameter_name, _, key = name.rpartition("|")
        parameter = parameters[parameter_name]
        if id(parameter) not in begun:  # this process holds none of its rows
            continue
        into = begun[id(parameter)][key]
        by_rows = isinstance(parameter, DTensor) and moments.by_rows(key)
        tensor = tensors.rows(name, *rows_of(cast(DTensor, parameter))) if by_rows else tensors[name]
        if tensor.shape != into.shape or tensor.dtype != into.dtype:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)} and the type {tensor.dtype}")
        into.copy_(tensor)


def _held_again(parameter: DTensor, name: str, tensors: Stored) -> DTensor:
    if tensors.shape(name) != tuple(parameter.shape):
        raise ValueError(f"{name} has the shape {tensors.shape(name)}")
    state = cast(DTensor, torch.zeros_like(parameter))
    state.to_local().copy_(tensors.rows(name, *rows_of(parameter)))
    return state


def rows_of(divided: DTensor) -> tuple[int, int]:
    """This process's rows of a divided tensor, as [start, stop) (`torch.chunk`'s division)."""
    rows, mesh = divided.shape[0], divided.device_mesh
    start = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    return start, start + divided.to_local().shape[0]


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Part]]:
    """Split tensors into undivided ones, and this process's parts of the divided ones."""
    whole = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    held = {
        name: Part(tensor.to_local(), rows_of(tensor)[0], tuple(tensor.shape))
        for name, tensor in tensors.items()
        if isinstance(tensor, DTensor)
    }
    return whole, held
