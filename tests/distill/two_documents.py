"""Windows of two documents each, and a mixer with a window."""

import torch

from distill.text.windows import Batch

MIXER = {"mixer": "discrete_mamba2", "window": {"size": 4, "sinks": 2}}


def text(rows=3, time=24):
    """Windows of two documents each."""
    documents = torch.zeros(rows, time, dtype=torch.long)
    documents[:, time // 2 :] = 1
    positions = torch.arange(time // 2).repeat(2).expand(rows, -1)
    ids, weights = torch.randint(1, 320, (rows, time + 1)), torch.ones(rows, time)
    weights[:, time // 2 - 1] = 0
    return Batch(ids[:, :-1], documents, positions, ids[:, 1:], weights, documents)
