"""`make test-gpu`: linear_scan and selective_scan, every shipped configuration against float64, in every type.

No product runs in either, so float32 is float32. Half precision also rounds the decays' logarithms, as the reference does.
"""

import pytest
import torch

from students import kernels
from students.kernels import linear_scan, selective_scan
from students.kernels.linear_scan import cases as linear_cases
from students.kernels.linear_scan import kernel as linear_kernel
from students.kernels.op import forced
from students.kernels.selective_scan import cases as selective_cases
from students.kernels.selective_scan import kernel as selective_kernel
from tests.gpu.test_kernels import FORMS, LENGTHS, check

pytestmark = pytest.mark.gpu

TYPES = ["bf16", "fp16", "fp32"]


def same_bits(run, leaves, fixed):
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    results = []
    for _ in range(2):
        y, final = run(**leaves, **fixed)
        results.append([y, final, *torch.autograd.grad(y.float().sum() + final.sum(), list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# linear_scan


every_linear_tile = pytest.mark.parametrize(
    ("config", "form"),
    [
        pytest.param(config, form, id=f"{config}-{form}")
        for config in [*linear_kernel.CONFIGS_16, *linear_kernel.CONFIGS_32]
        for form in TYPES
        if form != "fp32" or config in linear_kernel.CONFIGS_32  # wider tiles are not shipped for 4-byte inputs
    ],
)


@every_linear_tile
def test_linear_scan(config, form):
    dtype = FORMS[form][0]
    for time, packed, segments in ((200, True, 3), (2049, False, None), (2049, True, 2)):
        draws = linear_cases.draw(linear_cases.Case(2, time, 200, packed), dtype, "cuda")
        check(forced(linear_kernel.linear_scan, config=config, segments=segments), linear_scan.reference_scan, draws, form)


@every_linear_tile
def test_linear_scan_cut_into_groups_of_segments(config, form):
    """Segments of several tiles, the last shorter, and of one each; more than two groups of them."""
    dtype = FORMS[form][0]
    for time, packed, segments, group in ((3001, True, 40, 8), (3001, False, 3001, config.group), (1000, True, 1000, 4)):
        draws = linear_cases.draw(linear_cases.Case(2, time, 200, packed), dtype, "cuda")
        run = forced(linear_kernel.linear_scan, config=config._replace(group=group), segments=segments)
        check(run, linear_scan.reference_scan, draws, form)


def test_linear_scan_of_many_programs_gives_the_same_bits_every_time():
    """More segments than run side by side, so that programs take further ones and wait for each other."""
    leaves, fixed = linear_cases.draw(linear_cases.Case(2, 16384, 2048, True), torch.bfloat16, "cuda")
    wanted = linear_scan.reference_scan(**leaves, **fixed)
    found = linear_kernel.linear_scan(**leaves, **fixed)
    for a, b in zip(found, wanted, strict=True):
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(linear_kernel.linear_scan(**leaves, **fixed), found, strict=True))
    same_bits(linear_kernel.linear_scan, leaves, fixed)


@pytest.mark.parametrize("form", TYPES)
@pytest.mark.parametrize("channels", [1, 33, 128])
def test_linear_scan_at_odd_sizes(channels, form):
    for time in LENGTHS:
        for packed in (False, True):
            draws = linear_cases.draw(linear_cases.Case(2, time, channels, packed), FORMS[form][0], "cuda")
            check(linear_kernel.linear_scan, linear_scan.reference_scan, draws, form)


@pytest.mark.parametrize("form", ["bf16", "fp16"])
def test_linear_scan_with_decays_in_float32(form):
    leaves, fixed = linear_cases.draw(linear_cases.Case(2, 700, 96, True), FORMS[form][0], "cuda")
    leaves["log_a"] = leaves["log_a"].float()
    check(linear_kernel.linear_scan, linear_scan.reference_scan, (leaves, fixed), form)


def test_linear_scan_gives_the_same_bits_twice():
    for segments in (1, 4, 300):
        draws = linear_cases.draw(linear_cases.Case(2, 5000, 96, True), torch.bfloat16, "cuda")
        same_bits(forced(linear_kernel.linear_scan, segments=segments), *draws)


def test_linear_scan_of_a_long_text():
    draws = linear_cases.draw(linear_cases.Case(1, 262_144, 128, True), torch.bfloat16, "cuda")
    check(linear_kernel.linear_scan, linear_scan.reference_scan, draws, "bf16")


def test_linear_scan_with_strides_beyond_32_bits():
    """Rows of a batch, and tokens, more than 2^31 elements apart."""
    far = torch.zeros(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
    leaves, fixed = linear_cases.draw(linear_cases.Case(2, 65, 32, False), torch.bfloat16, "cuda")
    wanted = linear_kernel.linear_scan(**leaves, **fixed)
    for strides in ((2**31, 64, 1), (4096, 2**25, 1)):
        x = far.as_strided((2, 65, 32), strides)
        x.copy_(leaves["x"])
        found = linear_kernel.linear_scan(**leaves | {"x": x}, **fixed)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("state_type", [torch.float32, torch.bfloat16])
def test_linear_scan_step(state_type):
    _, fixed = linear_cases.draw_step(linear_cases.Case(3, 1, 700, False), torch.bfloat16, "cuda")
    step(linear_scan.linear_scan_step, linear_scan.reference_step, fixed, state_type)


# selective_scan


@pytest.mark.parametrize("form", TYPES)
@pytest.mark.parametrize(
    ("states", "config"), [(n, config) for n, choices in selective_kernel.CONFIGS.items() for config in choices], ids=str
)
def test_selective_scan(states, config, form):
    for time, packed, segments in ((200, True, 3), (2049, False, None)):
        case = selective_cases.Case(2, time, 200, 1, states, packed)
        draws = selective_cases.draw(case, FORMS[form][0], "cuda")
        run = forced(selective_kernel.selective_scan, config=config, segments=segments)
        check(run, selective_scan.reference_scan, draws, form)


@pytest.mark.parametrize("form", TYPES)
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (40, 1), (66, 2), (64, 64)])
def test_selective_scan_at_odd_sizes(channels, groups, form):
    for time in LENGTHS:
        for packed in (False, True):
            case = selective_cases.Case(2, time, channels, groups, 13, packed)
            draws = selective_cases.draw(case, FORMS[form][0], "cuda")
            check(selective_kernel.selective_scan, selective_scan.reference_scan, draws, form)


def test_selective_scan_gives_the_same_bits_twice():
    for segments in (1, 4):
        draws = selective_cases.draw(selective_cases.Case(2, 1000, 96, 2, 16, True), torch.bfloat16, "cuda")
        same_bits(forced(selective_kernel.selective_scan, segments=segments), *draws)


def test_selective_scan_of_a_long_text():
    draws = selective_cases.draw(selective_cases.Case(1, 262_144, 32, 1, 8, True), torch.bfloat16, "cuda")
    check(selective_kernel.selective_scan, selective_scan.reference_scan, draws, "bf16")


def test_selective_scan_with_strides_beyond_32_bits():
    """Rows of a batch, and tokens, more than 2^31 elements apart."""
    far = torch.zeros(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
    leaves, fixed = selective_cases.draw(selective_cases.Case(2, 65, 32, 1, 16, False), torch.bfloat16, "cuda")
    wanted = selective_kernel.selective_scan(**leaves, **fixed)
    for strides in ((2**31, 64, 1), (4096, 2**25, 1)):
        x = far.as_strided((2, 65, 32), strides)
        x.copy_(leaves["x"])
        found = selective_kernel.selective_scan(**leaves | {"x": x}, **fixed)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("state_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "states"), [(1, 16), (10, 13), (1, 128)])
def test_selective_scan_step(groups, states, state_type):
    _, fixed = selective_cases.draw_step(selective_cases.Case(3, 1, 700, groups, states, False), torch.bfloat16, "cuda")
    step(selective_scan.selective_scan_step, selective_scan.reference_step, fixed, state_type)


def step(run, reference, fixed, state_type):
    state = fixed.pop("state").to(state_type)
    wanted = reference(**{name: part.double() for name, part in fixed.items()}, state=state.double())
    with kernels.backend("triton"):
        y, after = run(**fixed, state=state)
    assert after.data_ptr() == state.data_ptr()
    torch.testing.assert_close(y.double(), wanted[0], rtol=1e-2, atol=1e-2)
    tolerance = 1e-5 if state_type == torch.float32 else 1e-2
    torch.testing.assert_close(after.double(), wanted[1], rtol=1e-2, atol=tolerance)
