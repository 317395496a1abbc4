"""Gated linear attention against its definition."""

import pytest
import torch

from students.kernels.gla import cases, gla, gla_step
from students.kernels.gla.reference import gla_recurrence
from tests.conftest import TOLERANCE
from tests.students.op_checks import assert_close, assert_same_gradients


def inputs(case, dtype=torch.float64):
    leaves, fixed = cases.draw(case, dtype, "cpu")
    return {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}, fixed


@pytest.mark.parametrize("case", cases.TEST, ids=str)
def test_gla(case):
    leaves, fixed = inputs(case)
    found, wanted = gla(**leaves, **fixed), gla_recurrence(**leaves, **fixed)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    assert_same_gradients(found, wanted, tuple(leaves.values()))


def test_states_join_pieces_and_steps():
    leaves, _ = inputs(cases.TEST[3])
    leaves = {name: leaf.detach() for name, leaf in leaves.items()}
    state = leaves.pop("initial_state")
    wanted, last = gla(**leaves, initial_state=state)
    pieces = []
    for start, stop in ((0, 70), (70, 71), (71, 198)):
        y, state = gla(**{name: leaf[:, start:stop] for name, leaf in leaves.items()}, initial_state=state)
        pieces.append(y)
    for t in (198, 199):
        y, state = gla_step(**{name: leaf[:, t] for name, leaf in leaves.items()}, state=state)
        pieces.append(y[:, None])
    assert_close(torch.cat(pieces, 1), wanted)
    assert_close(state, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype):
    leaves, fixed = inputs(cases.TEST[3], dtype)
    y, final = gla(**leaves, **fixed)
    wanted, wanted_final = gla_recurrence(**leaves, **fixed)
    assert y.dtype == dtype and final.dtype == torch.float32
    assert_close(y.double(), wanted, TOLERANCE[dtype])
    assert_close(final.double(), wanted_final, TOLERANCE[torch.float32])


@pytest.mark.parametrize("decay", [-300.0, -7.0, 0.0])
def test_strong_decays(decay):
    """In float32, where a product of exp(G) and exp(-G) would overflow; only every other channel decays."""
    leaves, fixed = inputs(cases.TEST[1], torch.float32)
    log_a = torch.zeros_like(leaves["log_a"])
    log_a[..., ::2] = decay
    leaves["log_a"] = log_a.requires_grad_()
    y, final = gla(**leaves, **fixed)
    assert_close(y.double(), gla_recurrence(**leaves, **fixed)[0], TOLERANCE[torch.float32])
    gradients = torch.autograd.grad(y.sum() + final.sum(), list(leaves.values()))
    assert all(torch.isfinite(part).all() for part in gradients)


def test_memory_is_linear_and_the_squares_are_not_kept():
    """Twice the length keeps about twice the memory, and less than one piece's decays of [piece piece n] a token."""
    held = [_saved_numbers(time) for time in (256, 512)]
    assert held[1] < 2.2 * held[0]
    assert held[0] < 256 * 2 * 16 * 16


def _saved_numbers(time):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    leaves, fixed = inputs(cases.Case(1, time, 2, 4, 16, False))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = gla(**leaves, **fixed)
    assert y.requires_grad
    return sum(kept.values())
