"""Agreement between the processes of one run: one error, one recipe, and the longest wait for each other."""

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from distill.errors import UserError, printable

# Longer than any work that one process does alone while the others wait (evaluation, exports, hashing checkpoints). The
# launcher, not this limit, notices that a process died.
PATIENCE = timedelta(days=2)
LONGEST = 4096  # bytes of an error message


def several() -> bool:
    """Whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_backends(gpu: bool) -> None:
    """Refuse several processes if PyTorch was built without the back end for their communication.

    Raises:
        UserError: naming the back end.
    """
    known = dist.is_available() and (dist.is_nccl_available() if gpu else dist.is_gloo_available())
    if not known:
        name, fix = ("NCCL", "use one GPU") if gpu else ("gloo", "use one process")
        raise UserError(f"this PyTorch ({torch.__version__}) has no {name}, which several processes need; {fix}")


def agreed(error: str | None, device: torch.device) -> str | None:
    """The error of the first process that has one, returned on all processes; None if none has."""
    if not several():
        return error
    world = dist.get_world_size()
    first = torch.tensor(world if error is None else dist.get_rank(), device=device)
    dist.all_reduce(first, dist.ReduceOp.MIN)
    if first.item() == world:
        return None
    said = torch.zeros(LONGEST, dtype=torch.uint8)
    if error is not None:
        text = printable(error).encode()[:LONGEST]
        said[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    said = said.to(device)
    dist.broadcast(said, int(first.item()))
    return bytes(said.tolist()).rstrip(b"\0").decode(errors="replace")


def all_or_none(work: Callable[[], object] | None, device: torch.device) -> None:
    """Do a process's share of some work, and return only if every process did its own. work: None for no share.

    Raises:
        UserError: the error of the first process that failed, raised on all processes.
    """
    error = None
    try:
        if work is not None:
            work()
    except UserError as found:
        error = str(found)
    if said := agreed(error, device):
        raise UserError(said)


def check_same(fingerprint: str, name: str, device: torch.device) -> None:
    """Refuse processes that were started with different recipes.

    Args:
        fingerprint, name: of this process's recipe; the fingerprint in hexadecimal.

    Raises:
        UserError: on all processes, naming the first that differs from process 0 and both fingerprints.
    """
    if not several():
        return
    mine = torch.tensor(int(fingerprint, 16), dtype=torch.int64, device=device)
    found = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    numbers = [one.item() for one in found]
    other = next((rank for rank, number in enumerate(numbers) if number != numbers[0]), None)
    if other is not None:
        raise UserError(
            f"process {other} was started with another recipe than process 0 (fingerprints {numbers[other]:08x} and "
            f"{numbers[0]:08x}; this one's is {name}); give all of them the same recipe and overrides"
        )
