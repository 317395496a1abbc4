"""Division of a list of items over the processes of a run: each does its share, and all get every result, in order.

The results are those of one process to the bit: each item is computed as one process would, and sums are taken afterwards.
Work is divided only inside `dividing`, which all processes enter. Work of one process alone is never divided.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distill.errors import Interrupted, UserError, reason_of

T = TypeVar("T")
R = TypeVar("R")
_together: ContextVar[bool] = ContextVar("together", default=False)


@contextmanager
def dividing(together: bool = True) -> Iterator[None]:
    """Inside the block, which every process of the run enters, work is divided; with False it is not."""
    token = _together.set(together)
    try:
        yield
    finally:
        _together.reset(token)


def shares() -> tuple[int, int]:
    """The number of this process's share of divided work, and the number of shares."""
    if _together.get() and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def divided(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """Apply `work` to each item; the results in order, on every process. Every process passes the same items.

    Args:
        work: returns plain data (numbers, text, lists, mappings).

    Raises:
        Exception: the error of the first item that failed, on every process.
    """
    share, count = shares()
    if count == 1:
        return [work(item) for item in items]
    done, failure = _share(items, work, share, count)
    parts = _gathered((done, failure))
    _raise_first([failed for _, failed in parts], failure)
    found = {index: result for part, _ in parts for index, result in part.items()}
    return [found[index] for index in range(len(items))]


def divided_tables(
    items: Sequence[T], work: Callable[[T], Tensor], shape_of: Callable[[T], Sequence[int]], device: torch.device
) -> list[Tensor]:
    """As `divided`, for work that returns float64 tensors, which are broadcast instead of pickled.

    Args:
        shape_of: the shape of an item's result, known before the work. device: the device of the processes' communication.

    Returns:
        the tensors, on the CPU.
    """
    share, count = shares()
    if count == 1:
        return [work(item).cpu() for item in items]
    done, failure = _share(items, lambda item: work(item).cpu(), share, count)
    _raise_first([failed for _, failed in _gathered((None, failure))], failure)
    found = []
    for index, item in enumerate(items):
        owner = index % count
        kept = done[index].to(device) if owner == share else torch.zeros(*shape_of(item), dtype=torch.float64, device=device)
        dist.broadcast(kept, owner)
        found.append(kept.cpu())
    return found


def first_decides(decide: Callable[[], R]) -> R:
    """Call `decide` on the first process alone; its plain data, on all of them.

    Raises:
        Exception: as `divided`.
    """
    return divided([None], lambda item: decide())[0]


Failure = tuple[int, Exception]


def _share(items: Sequence[T], work: Callable[[T], R], share: int, count: int) -> tuple[dict[int, R], Failure | None]:
    """This process's results by item number, and the error of the first item that failed."""
    done: dict[int, R] = {}
    with dividing(False):
        for index in range(share, len(items), count):
            try:
                done[index] = work(items[index])
            except Exception as error:
                return done, (index, error)
    return done, None


def _gathered(mine: tuple[Any, Failure | None]) -> list[tuple[Any, tuple[int, Exception] | None]]:
    """The results and the failure of every process; failures in a form that another process can raise."""
    found, failure = mine
    told = None if failure is None else (failure[0], _as_told(failure[1]))
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (found, told))
    return parts


def _as_told(error: Exception) -> Exception:
    """An error as the other processes raise it: our own kinds unchanged, any other as a RuntimeError with its text."""
    if isinstance(error, UserError | Interrupted):
        return type(error)(str(error))
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return MemoryError(f"another process: {error}")
    return RuntimeError(f"another process: {type(error).__name__}: {reason_of(error)}")


def _raise_first(failures: Sequence[Failure | None], own: Failure | None) -> None:
    """Raise the failure of the first item in order, as the original exception if it is this process's own."""
    failed = min((failure for failure in failures if failure is not None), key=lambda failure: failure[0], default=None)
    if failed is None:
        return
    if own is not None and own[0] == failed[0]:
        raise own[1]
    raise failed[1]
