"""linear_scan and selective_scan against their definitions, forward and all gradients, in float64; narrower types too."""

import pytest
import torch

from students.kernels import linear_scan, selective_scan
from students.kernels.linear_scan import cases as linear_cases
from students.kernels.linear_scan import reference as linear_reference
from students.kernels.linear_scan.reference import linear_scan_recurrence
from students.kernels.selective_scan import cases as selective_cases
from students.kernels.selective_scan import reference as selective_reference
from students.kernels.selective_scan.reference import selective_scan_recurrence
from tests.conftest import TOLERANCE
from tests.students.op_checks import assert_close, assert_same_gradients

OPS = {
    "linear_scan": (linear_scan.linear_scan, linear_scan_recurrence, linear_cases),
    "selective_scan": (selective_scan.selective_scan, selective_scan_recurrence, selective_cases),
}
CASES = [(name, case) for name, (_, _, cases) in OPS.items() for case in cases.TEST] + [("linear_scan", linear_cases.LONG)]
LONGEST = 3  # index, in TEST, of the case that the other tests take


def inputs(name, case, dtype=torch.float64):
    """Leaves that want gradients, and the other arguments."""
    leaves, fixed = OPS[name][2].draw(case, dtype, "cpu")
    return {key: leaf.to(dtype).requires_grad_() for key, leaf in leaves.items()}, fixed


@pytest.mark.parametrize("doubled", [False, True], ids=["token by token", "doubled"])
@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
def test_outputs_and_gradients(name, case, doubled, monkeypatch):
    """As a CPU goes through a chunk, and as a GPU does."""
    if doubled:
        for module in (linear_reference, selective_reference):
            monkeypatch.setattr(module, "states_of", linear_reference._doubled)
    leaves, fixed = inputs(name, case)
    found, wanted = (function(**leaves, **fixed) for function in OPS[name][:2])
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    assert_same_gradients(found, wanted, list(leaves.values()))


@pytest.mark.parametrize("name", OPS)
def test_starts_from_nothing(name):
    leaves, fixed = inputs(name, OPS[name][2].TEST[LONGEST])
    del leaves["initial_state"]
    found, wanted = (function(**leaves, **fixed)[0] for function in OPS[name][:2])
    assert_close(found, wanted)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow(name, dtype):
    leaves, fixed = inputs(name, OPS[name][2].TEST[LONGEST], dtype)
    (y, final), (wanted, wanted_final) = (function(**leaves, **fixed) for function in OPS[name][:2])
    assert y.dtype == dtype and final.dtype == torch.float32
    assert_close(y.double(), wanted, TOLERANCE[dtype])
    assert_close(final.double(), wanted_final, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", OPS)
def test_survives_decay_to_nothing(name):
    leaves, fixed = inputs(name, OPS[name][2].TEST[LONGEST], torch.float32)
    decay = "log_a" if name == "linear_scan" else "A"
    leaves[decay] = torch.full_like(leaves[decay], -3e4, requires_grad=True)
    y, final = OPS[name][0](**leaves, **fixed)
    (y.sum() + final.sum()).backward()
    assert_close(y, OPS[name][1](**leaves, **fixed)[0].float(), TOLERANCE[torch.float32])
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves.values())


@pytest.mark.parametrize("name", OPS)
def test_memory_is_linear(name):
    """Four times the length keeps about four times the memory for the backward pass, and little more than the inputs."""
    small, large = (_saved_bytes(name, OPS[name][2].TEST[LONGEST]._replace(t=t)) for t in (1024, 4096))
    assert large < 4.5 * small
    leaves, _ = inputs(name, OPS[name][2].TEST[LONGEST]._replace(t=4096))
    assert large < 2 * sum(leaf.nbytes for leaf in leaves.values())


def _saved_bytes(name, case):
    kept = {}  # by storage: every chunk keeps the same inputs

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves, fixed = inputs(name, case)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = OPS[name][0](**leaves, **fixed)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("name", OPS)
def test_steps_are_the_scan(name):
    cases = OPS[name][2]
    leaves, fixed = inputs(name, cases.TEST[1])
    step = linear_scan.linear_scan_step if name == "linear_scan" else selective_scan.selective_scan_step
    state = leaves["initial_state"]
    wanted, wanted_final = OPS[name][0](**leaves, **fixed)
    outputs = []
    for i in range(wanted.shape[1]):
        token = {key: leaf if key == "A" else leaf[:, i] for key, leaf in leaves.items() if key != "initial_state"}
        y, state = step(**token, state=state)
        outputs.append(y)
    assert_close(torch.stack(outputs, 1), wanted)
    assert_close(state, wanted_final)


def test_refuses_groups_that_do_not_divide():
    leaves, _ = inputs("selective_scan", selective_cases.TEST[2])
    with pytest.raises(ValueError, match="6 channels cannot share 4 groups"):
        selective_scan.selective_scan(**leaves | {"B": leaves["B"][:, :, :4], "C": leaves["C"][:, :, :4]})
