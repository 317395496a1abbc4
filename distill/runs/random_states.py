"""Random states of a process (torch, CUDA, Python, NumPy) as tensors of a checkpoint."""

import json
import random
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor


def random_tensors() -> dict[str, Tensor]:
    """The random states of every generator that a stage could draw from."""
    python = json.dumps(random.getstate()).encode()
    kind, keys, position, has_gauss, cached = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    numpy = json.dumps([kind, keys.tolist(), position, has_gauss, cached]).encode()
    states = {"torch": torch.get_rng_state(), "python": _bytes(python), "numpy": _bytes(numpy)}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def load_random(states: Mapping[str, Tensor]) -> None:
    """Restore the random states."""
    torch.set_rng_state(states["torch"])
    version, internal, gauss = json.loads(bytes(states["python"].tolist()))
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = json.loads(bytes(states["numpy"].tolist()))
    np.random.set_state((kind, np.asarray(keys, np.uint32), position, has_gauss, cached))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
