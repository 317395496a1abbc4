"""Running out of memory, said as what to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distill.errors import UserError

SAYINGS = ("out of memory", "can't allocate memory", "not enough memory")  # of torch's allocators, GPU and CPU


@contextmanager
def enough_memory(doing: str, lower: str) -> Iterator[None]:
    """Turn an allocator's failure inside the block into a message.

    Args:
        doing: what runs. lower: the keys to lower, with their values.

    Raises:
        UserError: the memory did not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{doing} ran out of memory: lower {lower}. ({first})") from error


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory did not suffice; torch's CPU allocator raises a plain RuntimeError."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in SAYINGS))
