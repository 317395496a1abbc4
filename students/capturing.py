"""What stands around the capture of a CUDA graph: its stream, what is not kept meanwhile, and what is said if it fails."""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache as once
from pathlib import Path

import torch
from transformers import PreTrainedModel

from students.static_cache import GraphError


@once
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: the allocator keeps memory of its own for each.

    Raises:
        ValueError: no GPU's device.
    """
    if device.type != "cuda":
        raise ValueError(f"graph=True captures a CUDA graph, and the model is on the {device.type}; leave it out")
    return torch.cuda.Stream(device)


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Let autocast copy weights anew: what it keeps is freed where autocast ends, and a graph would read it still."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[None]:
    """Raise where an operation waits for the GPU, which no graph can hold: a failed capture is worse to get out of."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is experimental
        torch.cuda.set_sync_debug_mode("error")
    try:
        with explained(model):
            yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def explained(model: PreTrainedModel) -> Iterator[None]:
    """Say of which model, and at which line, one token cannot be captured."""
    try:
        yield
    except (torch.OutOfMemoryError, GraphError):
        raise
    except RuntimeError as error:
        while isinstance(error.__context__, RuntimeError):  # what ends a failed capture hides what made it fail
            error = error.__context__
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        said = (str(error).splitlines() or [type(error).__name__])[0]
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise GraphError(
            f"one token of {type(model).__name__} cannot be captured as a CUDA graph: {Path(at.filename).name}, line "
            f"{at.lineno}, {at.line!r}: {said}; decode without graphs"
        ) from error
