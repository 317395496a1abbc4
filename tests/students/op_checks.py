"""Inputs of ops in float64, and comparisons of outputs and gradients."""

import torch

from tests.conftest import TOLERANCE


def draw(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def packed_documents(batch, time, packed):
    """Documents of random lengths, another draw a row; None where nothing is packed."""
    if not packed:
        return None
    return (torch.rand(batch, time) < 0.15).long().cumsum(1)


def assert_close(actual, expected, tolerance=TOLERANCE[torch.float64], name=""):
    scale = expected.abs().max().clamp_min(1.0)
    assert (actual - expected).abs().max() <= tolerance * scale, name


def assert_same_gradients(outputs, expected, inputs):
    weights = [torch.randn_like(output) for output in expected]
    losses = [sum((o * w).sum() for o, w in zip(group, weights, strict=True)) for group in (outputs, expected)]
    found, wanted = (torch.autograd.grad(loss, inputs, allow_unused=True) for loss in losses)
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert_close(a, b, name=f"gradient {index}")


def tiny(op):
    """A case of an op that its reference in float64, and Triton's interpreter, are done with at once."""
    case = op.small(op.cases[0])
    sizes = {"t": 20, "v": 30, "d": 8, "e": 8, "c": 64}
    return case._replace(
        **{field: size for field, size in sizes.items() if hasattr(case, field) and getattr(case, "t", 1) > 1}
    )
