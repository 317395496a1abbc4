"""What the processes of one run agree on: one reason to stop, one recipe, and how long they wait for each other."""

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from distill.errors import UserError, printable

# Longer than any work that one process does alone while the others wait (judging, exports, hashing checkpoints). That a
# process died is noticed by whoever started it, not by this.
PATIENCE = timedelta(days=2)
LONGEST = 4096  # bytes of a reason


def several() -> bool:
    """Whether this process is one of several that can talk to each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_backends(gpu: bool) -> None:
    """Refuse several processes where PyTorch was built without what they talk through.

    Raises:
        UserError: naming the back end.
    """
    known = dist.is_available() and (dist.is_nccl_available() if gpu else dist.is_gloo_available())
    if not known:
        name, fix = ("NCCL", "use one GPU") if gpu else ("gloo", "use one process")
        raise UserError(f"this PyTorch ({torch.__version__}) has no {name}, through which several processes talk; {fix}")


def agreed(error: str | None, device: torch.device) -> str | None:
    """The reason of the first process that has one, on all of them; None where none has."""
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
    """Do a process's share of some work (None: it has none), and go on only where each process did its own.

    Raises:
        UserError: of the first process whose share failed, on all of them.
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
    """Refuse processes of which one was started with another recipe than the first.

    Args:
        fingerprint: of this one's recipe, in hexadecimal. name: of it.

    Raises:
        UserError: on all processes, naming the first that differs and both fingerprints.
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
