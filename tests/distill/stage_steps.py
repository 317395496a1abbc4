"""Batches for stages, and what a step changes."""

import torch

from distill.text.windows import Batch


def batch(rows=3, time=24):
    documents = torch.zeros(rows, time, dtype=torch.long)
    documents[:, time // 2 :] = 1
    positions = torch.cat([torch.arange(time // 2), torch.arange(time - time // 2)]).expand(rows, -1)
    ids, weights = torch.randint(1, 320, (rows, time + 1)), torch.ones(rows, time)
    weights[:, time // 2 - 1] = 0
    return Batch(ids[:, :-1], documents, positions, ids[:, 1:], weights, documents)


def calibration(*batches):
    return lambda tokens: iter(batches)


def snapshot(student):
    return {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}


def changed(student, before):
    return {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
