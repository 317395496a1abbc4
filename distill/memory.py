"""Messages for running out of memory, which name the settings to lower, and the memory of a device."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from distill.errors import UserError

SAYINGS = ("out of memory", "can't allocate memory", "not enough memory")  # in errors of torch's GPU and CPU allocators


@contextmanager
def enough_memory(doing: str, lower: str | None = None) -> Iterator[None]:
    """Turn an allocator's failure inside the block into a message.

    Args:
        doing: what runs. lower: the keys to lower, with their values; None if no key helps.

    Raises:
        UserError: the memory did not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        fix = f"lower {lower}" if lower else "free memory, or use a machine with more"
        raise UserError(f"{doing} ran out of memory: {fix}. ({first})") from error


def or_cpu(device: torch.device) -> str:
    """The further advice `set device=cpu` if the device is a GPU."""
    return ", or set device=cpu" if device.type == "cuda" else ""


def capacity(device: torch.device) -> int:
    """The total memory of a device in bytes. For a CPU: the machine's memory or the limit of its control group, if less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control groups, or one that sets no limit ("max")
        return machine


def available(device: torch.device) -> int:
    """The free memory of a device in bytes. For a CPU: the machine's free memory or what its control group has left, if
    less."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration, ValueError):  # no Linux
        return capacity(device) // 2
    try:
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()) - used)
    except (OSError, ValueError):
        return free


def check_room_for(count: float, device: torch.device, what: str, instead: str) -> None:
    """Refuse work that takes more than the total memory of a device.

    Args:
        count: bytes. what: what takes them. instead: what to ask for instead.

    Raises:
        UserError: giving both sizes.
    """
    room = capacity(device)
    if count > room:
        raise UserError(
            f"{what} take {count / 2**30:,.1f} GiB, and the memory of this {device.type} is {room / 2**30:,.1f} GiB; ask "
            f"for {instead}"
        )


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out; torch's CPU allocator raises a plain RuntimeError."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in SAYINGS))
