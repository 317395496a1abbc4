"""The scan kernels against their references in float64, outputs and all gradients: in the interpreter where there is no GPU.

Every shipped configuration runs once; small tiles and forced numbers of segments let several of them meet. The interpreter
scans number after number, so shapes are tiny here.
"""

import pytest
import torch

from distill.benchmarks.check import relative_errors
from students import kernels
from students.kernels import linear_scan, selective_scan
from students.kernels.linear_scan import cases as linear_cases
from students.kernels.linear_scan import kernel as linear_kernel
from students.kernels.op import forced
from students.kernels.selective_scan import cases as selective_cases
from students.kernels.selective_scan import kernel as selective_kernel
from tests.students.triton_checks import DEVICE, check

LINEAR = [
    linear_cases.Case(1, 1, 3, False),
    linear_cases.Case(2, 63, 20, True),
    linear_cases.Case(1, 100, 20, True),
    linear_cases.Case(2, 50, 5, False),
]
SMALL = linear_kernel.Config(16, 4, 2, 1, 2)


# linear_scan


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_scan(case, segments):
    run = forced(linear_kernel.linear_scan, config=SMALL, segments=segments)
    check(relative_errors(run, linear_scan.reference_scan, *linear_cases.draw(case, torch.float32, DEVICE)))


@pytest.mark.parametrize(("segments", "group"), [(7, 2), (50, 4)])  # of several tiles, the last shorter; of one each
@pytest.mark.parametrize("case", [linear_cases.Case(2, 78, 5, True), linear_cases.Case(1, 85, 20, False)], ids=str)
def test_linear_scan_cut_into_groups_of_segments(case, segments, group):
    run = forced(linear_kernel.linear_scan, config=SMALL._replace(rows=2, group=group), segments=segments)
    check(relative_errors(run, linear_scan.reference_scan, *linear_cases.draw(case, torch.float32, DEVICE)))


def test_linear_scan_cuts_where_blocks_are_few():
    """As a caller meets it: a document that spans segments, one that ends where a segment does, no state before them."""
    leaves, fixed = linear_cases.draw(linear_cases.Case(1, 145, 12, True), torch.float32, DEVICE)
    fixed["documents"] = torch.tensor([0] * 80 + [1] * 48 + [2] * 17, device=DEVICE)[None]
    config = SMALL._replace(tokens=16, group=2)
    assert linear_kernel._plan(leaves["x"], config, config.rows, None).segments > 2 * config.group or DEVICE == "cuda"
    del leaves["initial_state"]
    run = forced(linear_kernel.linear_scan, config=config, initial_state=None)
    check(relative_errors(run, forced(linear_scan.reference_scan, initial_state=None), leaves, fixed))


@pytest.mark.matrix
@pytest.mark.parametrize("config", {*linear_kernel.CONFIGS_16, *linear_kernel.CONFIGS_32}, ids=str)
def test_linear_scan_as_shipped(config):
    draws = linear_cases.draw(linear_cases.Case(1, config.rows + 3, 3, True), torch.float16, DEVICE)
    run = forced(linear_kernel.linear_scan, config=config)
    check(relative_errors(run, linear_scan.reference_scan, *draws), torch.float16)


@pytest.mark.parametrize("type_of_decays", [torch.float32, torch.float16])
def test_linear_scan_from_views_without_a_state(type_of_decays):
    x, _ = torch.randn(1, 20, 2 * 12, device=DEVICE).half().split(12, -1)
    log_a = -torch.rand(20, 1, 12, device=DEVICE).to(type_of_decays).transpose(0, 1)
    with kernels.backend("triton"):
        found = linear_scan.linear_scan(x, log_a)
    wanted = linear_scan.reference_scan(x.double(), log_a.double(), None, None)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=2e-5, atol=2e-5)


def test_linear_scan_gives_a_gradient_of_the_state_alone():
    leaves, fixed = linear_cases.draw(LINEAR[3], torch.float32, DEVICE)

    def final(run):
        return lambda **inputs: run(**inputs)[1]

    check(
        relative_errors(
            final(forced(linear_kernel.linear_scan, config=SMALL)), final(linear_scan.reference_scan), leaves, fixed
        )
    )


def test_linear_scan_survives_decay_to_nothing():
    leaves, fixed = linear_cases.draw(LINEAR[2], torch.float32, DEVICE)
    leaves["log_a"] = torch.full_like(leaves["log_a"], -300.0)
    run = forced(linear_kernel.linear_scan, config=SMALL)
    errors = relative_errors(run, linear_scan.reference_scan, leaves, fixed)
    assert errors.pop("gradient of log_a") < 1  # it is nothing: no relative error
    check(errors)


@pytest.mark.parametrize("state_type", [torch.float32, torch.float16])
def test_linear_scan_step(state_type):
    _, fixed = linear_cases.draw_step(linear_cases.Case(3, 1, 700, False), torch.float32, DEVICE)
    state = fixed.pop("state").to(state_type)
    wanted = linear_scan.reference_step(**{name: part.double() for name, part in fixed.items()}, state=state.double())
    with kernels.backend("triton"):
        h, after = linear_scan.linear_scan_step(**fixed, state=state)
    assert after.data_ptr() == state.data_ptr()
    torch.testing.assert_close(h.double(), wanted[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(state.double(), wanted[1], rtol=0, atol=1e-5 if state_type == torch.float32 else 5e-3)


# selective_scan


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(
    "case",
    [
        selective_cases.Case(1, 1, 3, 1, 4, False),
        selective_cases.Case(2, 63, 12, 2, 5, True),
        selective_cases.Case(1, 200, 20, 1, 16, True),
        selective_cases.Case(1, 130, 6, 6, 3, False),
    ],
    ids=str,
)
def test_selective_scan(case, segments):
    run = forced(selective_kernel.selective_scan, segments=segments)
    check(relative_errors(run, selective_scan.reference_scan, *selective_cases.draw(case, torch.float32, DEVICE)))


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("states", "config"), [(n, config) for n, choices in selective_kernel.CONFIGS.items() for config in choices], ids=str
)
def test_selective_scan_as_shipped(states, config):
    draws = selective_cases.draw(selective_cases.Case(1, 70, 10, 1, states, True), torch.float16, DEVICE)
    run = forced(selective_kernel.selective_scan, config=config)
    check(relative_errors(run, selective_scan.reference_scan, *draws), torch.float16)


def test_selective_scan_from_views_without_a_state():
    """Inputs cut out of one tensor, as a mixer cuts them, dt in float32, and no gradient asked for."""
    joined = torch.randn(1, 30, 10 + 2 * 2 * 4, device=DEVICE).half()
    x, B, C = joined.split([10, 8, 8], -1)
    B, C, dt = B.unflatten(-1, (2, 4)), C.unflatten(-1, (2, 4)), torch.rand(1, 10, 30, device=DEVICE).transpose(1, 2)
    A = -torch.rand(10, 4, device=DEVICE)
    with kernels.backend("triton"):
        found = selective_scan.selective_scan(x, dt, A, B, C)
    wanted = selective_scan.reference_scan(x.double(), dt.double(), A.double(), B.double(), C.double(), None, None)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=2e-3, atol=4e-3)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=2e-5, atol=2e-5)


def test_selective_scan_gives_a_gradient_of_the_state_alone():
    leaves, fixed = selective_cases.draw(selective_cases.Case(1, 40, 6, 2, 4, True), torch.float32, DEVICE)

    def final(run):
        return lambda **inputs: run(**inputs)[1]

    check(relative_errors(final(selective_kernel.selective_scan), final(selective_scan.reference_scan), leaves, fixed))


def test_selective_scan_survives_decay_to_nothing():
    leaves, fixed = selective_cases.draw(selective_cases.Case(1, 40, 6, 2, 4, True), torch.float32, DEVICE)
    leaves["A"], leaves["dt"] = torch.full_like(leaves["A"], -3e4), leaves["dt"] + 0.1
    errors = relative_errors(selective_kernel.selective_scan, selective_scan.reference_scan, leaves, fixed)
    assert errors.pop("gradient of A") < 1  # it is nothing: no relative error
    check(errors)


@pytest.mark.parametrize("state_type", [torch.float32, torch.float16])
def test_selective_scan_step(state_type):
    _, fixed = selective_cases.draw_step(selective_cases.Case(3, 1, 70, 7, 6, False), torch.float32, DEVICE)
    state = fixed.pop("state").to(state_type)
    wanted = selective_scan.reference_step(**{name: part.double() for name, part in fixed.items()}, state=state.double())
    with kernels.backend("triton"):
        y, after = selective_scan.selective_scan_step(**fixed, state=state)
    assert after.data_ptr() == state.data_ptr()
    torch.testing.assert_close(y.double(), wanted[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(state.double(), wanted[1], rtol=0, atol=1e-5 if state_type == torch.float32 else 5e-3)


def test_the_scans_refuse_what_they_cannot_do():
    x, wide = torch.randn(1, 2, 4, device=DEVICE), torch.randn(1, 2, 1, 300, device=DEVICE)
    with kernels.backend("triton"):
        with pytest.raises(ValueError, match="300 states per channel are more than 256"):
            selective_scan.selective_scan(x, x.abs(), -torch.ones(4, 300, device=DEVICE), wide, wide)
        with pytest.raises(ValueError, match="has no gradient"):
            linear_scan.linear_scan_step(x[:, 0], x[:, 1], torch.zeros(1, 4, device=DEVICE, requires_grad=True))
        with pytest.raises(ValueError, match="has no gradient"):
            B, state = wide[:, 0, :, :3], torch.zeros(1, 4, 3, device=DEVICE, requires_grad=True)
            selective_scan.selective_scan_step(x[:, 0], x[:, 1].abs(), -torch.ones(4, 3, device=DEVICE), B, B, state)


def test_selective_scan_keeps_a_document_of_one_last_token():
    leaves, fixed = selective_cases.draw(selective_cases.Case(1, 11, 3, 1, 2, False), torch.float32, DEVICE)
    fixed["documents"] = torch.tensor([[0] * 10 + [1]], device=DEVICE)
    check(relative_errors(selective_kernel.selective_scan, selective_scan.reference_scan, leaves, fixed))
