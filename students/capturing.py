"""Helpers for the capture of CUDA graphs: the stream, the autocast cache, and errors that name the failing line."""

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
    """The stream of all captures on a device: the allocator reserves memory for each stream, so there is only one.

    Raises:
        ValueError: the device is not a GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"graph=True captures a CUDA graph, but the model is on the {device.type}; leave it out")
    return torch.cuda.Stream(device)


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Turn off autocast's cache of weights: its copies are freed when autocast ends, but a graph would still read them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[None]:
    """Raise where an operation waits for the GPU, before a capture: a graph cannot contain it, and a capture that has failed
    is harder to recover from."""
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
    """Turn an error of a capture into a `GraphError` that names the model and the line."""
    try:
        yield
    except (torch.OutOfMemoryError, GraphError):
        raise
    except RuntimeError as error:
        while isinstance(error.__context__, RuntimeError):  # the error that ends a capture hides its cause
            error = error.__context__
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        said = (str(error).splitlines() or [type(error).__name__])[0]
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise GraphError(
            f"one token of {type(model).__name__} cannot be captured as a CUDA graph: {Path(at.filename).name}, line "
            f"{at.lineno}, {at.line!r}: {said}; decode without graphs"
        ) from error
