"""What ops declare of themselves; `ssd` and `causal_conv` against their definitions, outputs and gradients, in float64."""

import ast
from importlib import import_module
from pathlib import Path

import pytest
import torch

import students
from students import kernels
from students.kernels import causal_conv, ssd
from students.kernels.causal_conv import cases as conv_cases
from students.kernels.op import all_ops, folders
from students.kernels.ssd import cases as ssd_cases
from students.kernels.ssd.reference import ssd_recurrence
from tests.conftest import TOLERANCE
from tests.students.op_checks import assert_close, assert_same_gradients, draw, packed_documents, tiny

# what an op says of itself


@pytest.mark.parametrize("folder", folders())
def test_a_folder_with_a_kernel_describes_it(folder):
    package = import_module(f"students.kernels.{folder}")
    described = getattr(import_module(f"{package.__name__}.cases"), "OPS", {})
    assert bool(described) == (Path(package.__file__).with_name("kernel.py").exists())
    for name, op in described.items():
        assert name.startswith(folder) and op.target.startswith(f"{package.__name__}.")
        assert callable(op.kernel()) and name in package.CHECKED
        assert all_ops()[name] is op


@pytest.mark.parametrize("name", all_ops())
def test_an_op_draws_its_smallest_case_and_its_reference_takes_it(name):
    op = all_ops()[name]
    leaves, fixed = op.draw(tiny(op), torch.float32, "cpu")
    outputs = op.adapted(op.reference)(**leaves, **fixed)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    assert torch.isfinite(first).all() and op.configs(tiny(op), torch.bfloat16)


def test_what_a_student_runs_imports_no_cases():
    """Portable exports take along whatever is imported."""
    folder = Path(students.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and path.name != "cases.py":
                assert node.module != "students.kernels.op" and not node.module.endswith(".cases"), path
                assert not {"cases", "op"} & {alias.name for alias in node.names}, path


# ssd


def ssd_inputs(case):
    x, B, C = (
        draw(case.b, case.t, case.h, case.p),
        draw(case.b, case.t, case.g, case.n),
        draw(case.b, case.t, case.g, case.n),
    )
    log_a = (-torch.rand(case.b, case.t, case.h, dtype=torch.float64)).requires_grad_()
    return x, log_a, B, C, packed_documents(case.b, case.t, case.packed), draw(case.b, case.h, case.p, case.n)


@pytest.mark.parametrize("case", [*ssd_cases.TEST, ssd_cases.LONG], ids=str)
def test_ssd(case):
    x, log_a, B, C, documents, state = ssd_inputs(case)
    found = ssd.ssd(x, log_a, B, C, documents, state)
    wanted = ssd_recurrence(x, log_a, B, C, documents, state)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    assert_same_gradients(found, wanted, (x, log_a, B, C, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ssd_narrow(dtype):
    x, log_a, B, C, documents, state = (
        part if part is None or not part.is_floating_point() else part.detach().to(dtype)
        for part in ssd_inputs(ssd_cases.TEST[3])
    )
    y, final = ssd.ssd(x, log_a, B, C, documents, state)
    wanted, wanted_final = ssd_recurrence(x, log_a, B, C, documents, state)
    assert y.dtype == dtype and final.dtype == torch.float32
    assert_close(y.double(), wanted, TOLERANCE[dtype])
    assert_close(final.double(), wanted_final, TOLERANCE[torch.float32])


def test_ssd_survives_decay_to_nothing():
    case = ssd_cases.TEST[1]
    x, _, B, C, documents, state = ssd_inputs(case)
    log_a = torch.full((case.b, case.t, case.h), -300.0, dtype=torch.float64, requires_grad=True)
    y, final = ssd.ssd(x, log_a, B, C, documents, state)
    (y.sum() + final.sum()).backward()
    assert_close(y, ssd_recurrence(x, log_a, B, C, documents, state)[0])
    assert all(torch.isfinite(part.grad).all() for part in (x, log_a, B, C, state))


def test_ssd_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="4 heads cannot share 3 groups"):
        ssd.ssd(draw(1, 2, 4, 2), draw(1, 2, 4), draw(1, 2, 3, 2), draw(1, 2, 3, 2))


# causal_conv


@pytest.mark.parametrize("case", conv_cases.TEST, ids=str)
def test_causal_conv(case):
    x, weight, bias, initial = (
        draw(case.b, case.t, case.c),
        draw(case.c, case.w),
        draw(case.c),
        draw(case.b, case.w - 1, case.c),
    )
    documents = packed_documents(case.b, case.t, case.packed)
    found = causal_conv.causal_conv(x, weight, bias, case.activation, documents, initial)
    wanted = conv_by_definition(x, weight, bias, case.activation, documents, initial)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    assert_same_gradients(found, wanted, (x, weight, bias, initial))


def conv_by_definition(x, weight, bias, activation, documents, initial):
    batch, time, _ = x.shape
    width = weight.shape[1]
    ids = torch.zeros(batch, time, dtype=torch.long) if documents is None else documents
    ids = torch.cat([ids[:, :1].expand(-1, width - 1), ids], 1)
    joined = torch.cat([initial, x], 1)
    rows = []
    for row in range(batch):
        outputs = []
        for t in range(width - 1, time + width - 1):
            taps = [weight[:, width - 1 - i] * joined[row, t - i] for i in range(width) if ids[row, t - i] == ids[row, t]]
            outputs.append(bias + sum(taps))
        rows.append(torch.stack(outputs))
    y = torch.stack(rows)
    kept = (ids[:, time:] == ids[:, -1:])[..., None]
    return torch.nn.functional.silu(y) if activation == "silu" else y, joined[:, time:] * kept


def test_causal_conv_refuses():
    with pytest.raises(ValueError, match="'relu' is unknown"):
        causal_conv.causal_conv(draw(1, 3, 2), draw(2, 4), activation="relu")
    with pytest.raises(ValueError, match="initial holds 2 tokens"):
        causal_conv.causal_conv(draw(1, 3, 2), draw(2, 4), initial=draw(1, 2, 2))


# the switch


def test_backend_switch():
    with pytest.raises(ValueError, match="'cuda' does not exist"), kernels.backend("cuda"):
        pass
    case = ssd_cases.TEST[0]
    x, log_a, B, C, _, _ = ssd_inputs(case)
    with kernels.backend("reference"):
        ssd.ssd(x, log_a, B, C)
    with kernels.backend("triton"), pytest.raises(ValueError, match="float16, bfloat16 or float32, not float64"):
        ssd.ssd(x, log_a, B, C)
