"""`make test-gpu`: the gated delta rule and GLA on a GPU, whichever implementation runs there unasked.

fla-core's kernels run only where their own check passed, so what runs must be right at other lengths and widths too.
"""

import pytest
import torch

from distill.bench.check import relative_errors
from students.kernels import fla, gated_delta_rule, gla
from students.kernels.gated_delta_rule import cases as delta_cases
from students.kernels.gla import cases as gla_cases
from students.kernels.trial import TOLERANCE

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DELTA = [delta_cases.Case(2, 200, 4, 2, 64, 64, True), delta_cases.Case(1, 2049, 2, 2, 128, 128, False)]
GLA = [gla_cases.Case(2, 200, 4, 64, 64, True), gla_cases.Case(1, 2049, 2, 128, 128, False)]
CALLS = [
    *((gated_delta_rule.gated_delta_rule, gated_delta_rule.reference_rule, delta_cases.draw, case) for case in DELTA),
    *((gla.gla, gla.reference_gla, gla_cases.draw, case) for case in GLA),
]
NAMES = ["delta", "long, wide delta", "gla", "long, wide gla"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("run", "reference", "draw", "case"), CALLS, ids=NAMES)
def test_what_runs_is_right(run, reference, draw, case, dtype):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        errors = relative_errors(run, reference, *draw(case, dtype, DEVICE))
    finally:
        torch.set_float32_matmul_precision(before)
    assert max(errors.values()) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("op", [gated_delta_rule, gla], ids=lambda op: op.__name__)
def test_the_log_names_what_runs(op, caplog, monkeypatch):
    from students import kernels

    monkeypatch.setattr(kernels, "_logged", set())
    name = op.__name__.rpartition(".")[2]
    cases = {"gated_delta_rule": delta_cases, "gla": gla_cases}[name]
    leaves, fixed = cases.draw(cases.check(64, 64), torch.bfloat16, DEVICE)
    with caplog.at_level("INFO"):
        getattr(op, name)(**leaves, **fixed)
    reason = fla.Kernel(name).missing() or fla.refusal(
        name, op.IMPLEMENTATIONS["reference"], cases.draw, cases.check(64, 64), leaves["v"]
    )
    said = f"{name} runs on its {'triton' if reason is None else 'reference'} implementation"
    assert said in caplog.text and (reason is None or reason in caplog.text)
