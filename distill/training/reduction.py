"""Averaging of gradients over processes once a step, in a few flat buckets that are reduced at the same time."""

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 2**25  # elements of a bucket: 128 MiB in float32, enough for the full bandwidth of a link


def average_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes of the default group.

    A gradient that only some processes have counts as 0 on the others. A parameter without a gradient on any process is
    skipped. A parameter with several names is averaged once. Gradients become views of the buckets, so that only the
    buckets are in memory afterwards.

    Args:
        parameters: by name, with the same names on every process; none of them sharded.
    """
    unique = list({id(parameters[name]): parameters[name] for name in sorted(parameters)}.values())
    for parameter in _present(unique):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    present = [parameter for parameter in unique if parameter.grad is not None]
    sent = []
    for bucket in _buckets(present):
        flat = torch.cat([cast(Tensor, parameter.grad).reshape(-1) for parameter in bucket])
        sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    world = dist.get_world_size()
    for bucket, flat, work in sent:
        work.wait()
        flat.div_(world)
        for parameter, part in zip(bucket, flat.split([parameter.numel() for parameter in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)


def _present(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters with a gradient on any process."""
    if not parameters:
        return []
    flags = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=parameters[0].device)
    dist.all_reduce(flags)
    return [parameter for parameter, count in zip(parameters, flags.tolist(), strict=True) if count]


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Group the parameters of one type into buckets, in order; a parameter larger than a bucket has its own."""
    by_type: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_type.setdefault(cast(Tensor, parameter.grad).dtype, []).append(parameter)
    for group in by_type.values():
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in group:
            if bucket and size + parameter.numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.numel()
        yield bucket


def total_norm(gradients: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> Tensor:
    """The 2-norm of all gradients together, the same number on every process.

    Args:
        gradients: whole ones, the same on every process. parts: this process's parts of sharded ones.
    """
    device = next(iter({**gradients, **parts}.values())).device
    squares = _squares(parts.values(), device)
    dist.all_reduce(squares)
    return (squares + _squares(gradients.values(), device)).sqrt().float()


def first_nonfinite_name(gradients: Mapping[str, Tensor], parts: Mapping[str, Tensor], names: list[str]) -> str | None:
    """The first name whose gradient is not finite on some process; None if all are finite.

    Args:
        gradients, parts: see `total_norm`. names: all of them, in an order that is the same on every process.
    """
    found = {**gradients, **parts}
    wrong = next((i for i, name in enumerate(names) if name in found and not found[name].isfinite().all()), len(names))
    device = next(iter(found.values())).device
    first = torch.tensor(wrong, device=device)
    dist.all_reduce(first, dist.ReduceOp.MIN)
    at = int(first.item())
    return names[at] if at < len(names) else None


def _squares(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    found = [tensor for tensor in tensors if tensor.numel()]
    if not found:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.nn.utils.get_total_norm(found).double().square()
