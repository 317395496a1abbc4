"""`make test-gpu`: the gated delta rule and GLA on a GPU, whichever implementation runs there unasked.

fla-core's kernels run only where their own check passed, so what runs must be right at other lengths and widths too.
"""

from importlib import import_module

import pytest
import torch

from distill.benchmarks.check import relative_errors
from students.kernels import fla
from students.kernels.op import folders
from students.kernels.trial import TOLERANCE

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
PACKAGES = {name: import_module(f"students.kernels.{name}") for name in folders()}
OPS = {name: op for name, op in PACKAGES.items() if isinstance(op.IMPLEMENTATIONS.get("triton"), fla.Kernel)}
CASES = {name: import_module(f"{op.__name__}.cases") for name, op in OPS.items()}
CALLS = [pytest.param(name, case, id=f"{name}-{case.t}") for name, cases in CASES.items() for case in cases.GPU]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "case"), CALLS)
def test_what_runs_is_right(name, case, dtype):
    run, reference = getattr(OPS[name], name), OPS[name].IMPLEMENTATIONS["reference"]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        errors = relative_errors(run, reference, *CASES[name].draw(case, dtype, DEVICE))
    finally:
        torch.set_float32_matmul_precision(before)
    assert max(errors.values()) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("name", OPS)
def test_the_log_names_what_runs(name, caplog, monkeypatch):
    from students import kernels

    op, cases = OPS[name], CASES[name]
    monkeypatch.setattr(kernels, "_logged", set())
    leaves, fixed = cases.draw(cases.check(64, 64), torch.bfloat16, DEVICE)
    with caplog.at_level("INFO"):
        getattr(op, name)(**leaves, **fixed)
    reason = fla.Kernel(name).missing() or fla.refusal(
        name, op.IMPLEMENTATIONS["reference"], cases.draw, cases.check(64, 64), leaves["v"]
    )
    said = f"{name} runs on its {'triton' if reason is None else 'reference'} implementation"
    assert said in caplog.text and (reason is None or reason in caplog.text)
