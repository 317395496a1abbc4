"""Work of many like parts divided over the processes of a run: each does its share, and all have every result, in order.

Results are those of one process to the bit, since each part is done as one process would do it and sums are taken
afterwards. Nothing is divided but where all processes say that they are there (`dividing`): what one does alone stays whole.
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
    """Inside the block, which every process of the run is in, work is divided; with False it is not."""
    token = _together.set(together)
    try:
        yield
    finally:
        _together.reset(token)


def shares() -> tuple[int, int]:
    """Which share of divided work this process does, and how many there are."""
    if _together.get() and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def divided(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """What `work` makes of each item, on every process and in order. Every process has the same items.

    Args:
        work: gives plain data (numbers, text, lists, mappings).

    Raises:
        Exception: what the first item in order that failed raised, on every process.
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
    """As `divided`, of work that gives float64 tensors, which are not gathered as plain data.

    Args:
        shape_of: an item's result, known without doing it. device: on which the processes talk.

    Returns:
        the tensors, on the host.
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
    """Plain data that the first process alone finds, on all of them.

    Raises:
        Exception: as `divided`.
    """
    return divided([None], lambda item: decide())[0]


Failure = tuple[int, Exception]


def _share(items: Sequence[T], work: Callable[[T], R], share: int, count: int) -> tuple[dict[int, R], Failure | None]:
    """This process's items by number, and what the first of them that failed raised."""
    done: dict[int, R] = {}
    with dividing(False):
        for index in range(share, len(items), count):
            try:
                done[index] = work(items[index])
            except Exception as error:
                return done, (index, error)
    return done, None


def _gathered(mine: tuple[Any, Failure | None]) -> list[tuple[Any, tuple[int, Exception] | None]]:
    """Of every process what it found, and its failure as another process can raise it."""
    found, failure = mine
    told = None if failure is None else (failure[0], _as_told(failure[1]))
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (found, told))
    return parts


def _as_told(error: Exception) -> Exception:
    """An error as the other processes raise it: ours as it is, any other in words."""
    if isinstance(error, UserError | Interrupted):
        return type(error)(str(error))
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return MemoryError(f"another process: {error}")
    return RuntimeError(f"another process: {type(error).__name__}: {reason_of(error)}")


def _raise_first(failures: Sequence[Failure | None], own: Failure | None) -> None:
    """Raise the failure of the first item in order; where it is this process's own, itself."""
    failed = min((failure for failure in failures if failure is not None), key=lambda failure: failure[0], default=None)
    if failed is None:
        return
    if own is not None and own[0] == failed[0]:
        raise own[1]
    raise failed[1]
