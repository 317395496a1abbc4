"""`make test-gpu`: every shipped tile configuration against float64 on a GPU, at odd lengths, in every type.

A float32 product runs as three tf32 products that add up to float32, or as one tf32 product where PyTorch may do so too.
"""

import pytest
import torch

from distill.benchmarks.check import relative_errors, tolerance
from students import kernels
from students.kernels import causal_conv, gated_norm, linear_kl, matrix_orientation, ssd
from students.kernels.causal_conv import cases as conv_cases
from students.kernels.causal_conv import kernel as conv_kernel
from students.kernels.gated_norm import cases as norm_cases
from students.kernels.gated_norm import kernel as norm_kernel
from students.kernels.linear_kl import cases as kl_cases
from students.kernels.linear_kl import kernel as kl_kernel
from students.kernels.matrix_orientation import cases as orientation_cases
from students.kernels.matrix_orientation import kernel as orientation_kernel
from students.kernels.op import all_ops, forced
from students.kernels.ssd import cases as ssd_cases
from students.kernels.ssd import kernel as ssd_kernel
from tests.students.op_checks import tiny

pytestmark = pytest.mark.gpu

FORMS = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
LENGTHS = [1, 63, 200, 2049]


def shipped(kernel):
    """Every (form, widest tile, configuration) of a kernel's two tables; float16 with the default only."""
    for form, (dtype, _) in FORMS.items():
        table = kernel.CONFIGS_16 if dtype.itemsize == 2 else kernel.CONFIGS_32
        for widest, choices in table.items():
            for config in choices[: 1 if form == "fp16" else None]:
                yield pytest.param(form, widest, config, id=f"{form}-{widest}-{'.'.join(map(str, config))}")


@pytest.fixture
def precision():
    """Let float32 products run in tf32, or not; put back what was."""
    before = torch.get_float32_matmul_precision()
    yield lambda tf32: torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.set_float32_matmul_precision(before)


def check(run, reference, draws, form):
    errors = relative_errors(run, reference, *draws)
    assert max(errors.values()) <= tolerance(*FORMS[form]), errors


# every op with a kernel, as its own folder describes it; what is special about each follows


@pytest.mark.parametrize("name", all_ops())
@pytest.mark.parametrize("form", ["bf16", "fp16", "fp32"])
def test_every_op(name, form, precision):
    """Every shipped configuration at odd sizes, and in the type of the benchmarks at what they are checked on."""
    op, (dtype, tf32) = all_ops()[name], FORMS[form]
    precision(tf32)
    for case in (tiny(op), op.small(op.cases[0]))[: 2 if form == "bf16" else 1]:
        for config in op.configs(case, dtype):
            run = forced(op.kernel(), **op.force(config))
            check(op.adapted(run), op.adapted(op.reference), op.draw(case, dtype, "cuda"), form)


# ssd


@pytest.mark.parametrize(("form", "widest", "config"), list(shipped(ssd_kernel)))
def test_ssd(form, widest, config, precision):
    dtype, tf32 = FORMS[form]
    precision(tf32)
    values = {64: 64, 128: 96, 256: 256}[widest]
    for time, packed, segments in ((200, True, 3), (2049, False, None)):
        case = ssd_cases.Case(2, time, 4, 2, values, widest, packed)
        run = forced(ssd_kernel.ssd, config=config, segments=segments)
        check(run, ssd.reference_ssd, ssd_cases.draw(case, dtype, "cuda"), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ssd_at_odd_sizes(form, groups, precision):
    dtype, tf32 = FORMS[form]
    precision(tf32)
    for time in LENGTHS:
        for packed in (False, True):
            case = ssd_cases.Case(2, time, 4, groups, 40, 24, packed)
            check(ssd_kernel.ssd, ssd.reference_ssd, ssd_cases.draw(case, dtype, "cuda"), form)


def test_ssd_gives_the_same_bits_twice():
    leaves, fixed = ssd_cases.draw(ssd_cases.Case(2, 1000, 4, 2, 64, 64, True), torch.bfloat16, "cuda")
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    results = []
    for _ in range(2):
        y, final = ssd_kernel.ssd(**leaves, **fixed)
        results.append([y, final, *torch.autograd.grad(y.float().sum() + final.sum(), list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_ssd_of_a_long_text():
    case = ssd_cases.Case(1, 262_144, 2, 2, 64, 64, True)
    check(ssd_kernel.ssd, ssd.reference_ssd, ssd_cases.draw(case, torch.bfloat16, "cuda"), "bf16")


def test_more_texts_and_heads_than_a_grid_axis_holds():
    """1,100 x 64 = 70,400; every axis of a grid but the first ends at 65,535."""
    many = 1100, 40, 64
    case = ssd_cases.Case(*many, 64, 4, 4, False)
    check(forced(ssd_kernel.ssd, segments=1), ssd.reference_ssd, ssd_cases.draw(case, torch.bfloat16, "cuda"), "bf16")
    check(forced(ssd_kernel.ssd, segments=2), ssd.reference_ssd, ssd_cases.draw(case, torch.bfloat16, "cuda"), "bf16")
    _, fixed = ssd_cases.draw_step(case, torch.bfloat16, "cuda")
    wanted = ssd.reference_step(**{name: part.double() for name, part in fixed.items()})
    torch.testing.assert_close(ssd_kernel.ssd_step(**fixed)[0].double(), wanted[0], rtol=1e-2, atol=1e-2)
    drawn = orientation_cases.draw(orientation_cases.Case(*many, 64, 4, 4, False, None, 0), torch.bfloat16, "cuda")
    check(orientation_kernel.orientation_error, matrix_orientation.reference_error, drawn, "bf16")


def test_ssd_with_strides_beyond_32_bits():
    """Rows of a batch, and tokens, more than 2^31 elements apart."""
    far = torch.zeros(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
    leaves, fixed = ssd_cases.draw(ssd_cases.Case(2, 65, 2, 2, 16, 16, False), torch.bfloat16, "cuda")
    for strides in ((2**31, 64, 32, 1), (4096, 2**25, 32, 1)):
        x = far.as_strided((2, 65, 2, 16), strides)
        x.copy_(leaves["x"])
        found = ssd_kernel.ssd(**leaves | {"x": x}, **fixed)
        wanted = ssd_kernel.ssd(**leaves, **fixed)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("state_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("values", "states"), [(64, 64), (64, 128), (40, 24), (256, 256)])
def test_ssd_step(values, states, state_type):
    _, fixed = ssd_cases.draw_step(ssd_cases.Case(3, 1, 4, 2, values, states, False), torch.bfloat16, "cuda")
    state = fixed.pop("state").to(state_type)
    wanted = ssd.reference_step(**{name: part.double() for name, part in fixed.items()}, state=state.double())
    with kernels.backend("triton"):
        y, after = ssd.ssd_step(**fixed, state=state)
    assert after.data_ptr() == state.data_ptr()
    torch.testing.assert_close(y.double(), wanted[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(after.double(), wanted[1], rtol=1e-2, atol=1e-5)


def test_ssd_step_goes_on_inside_a_graph():
    """A captured step, replayed, is as many steps."""
    _, fixed = ssd_cases.draw_step(ssd_cases.Case(2, 1, 4, 2, 64, 64, False), torch.bfloat16, "cuda")
    start = fixed["state"].clone()
    ssd_kernel.ssd_step(**fixed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ssd_kernel.ssd_step(**fixed)
    fixed["state"].copy_(start)
    for _ in range(3):
        graph.replay()
    wanted = start.double()
    for _ in range(3):
        _, wanted = ssd.reference_step(**{k: v.double() for k, v in fixed.items() if k != "state"}, state=wanted)
    torch.testing.assert_close(fixed["state"].double(), wanted, rtol=1e-5, atol=1e-5)


# linear_kl


@pytest.mark.parametrize("block", kl_kernel.BLOCKS)
@pytest.mark.parametrize("form", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_linear_kl(form, divergence, block):
    run = forced(kl_kernel.linear_kl, rows=128, block=block)
    for time, vocabulary, options in ((1, 37, {}), (300, 5003, {"temperature": 2.0, "ce_weight": 0.3, "softcap": 5.0})):
        leaves, fixed = kl_cases.draw(kl_cases.Case(time, vocabulary, 64, 96), FORMS[form][0], "cuda")
        fixed |= {"divergence": divergence} | options

        def call(implementation):
            return lambda **inputs: kl_cases.call(implementation, **inputs)

        check(call(run), call(linear_kl.reference_kl), (leaves, fixed), form)


def test_linear_kl_of_float32_hidden_states_under_autocast(precision):
    """Factors in bfloat16, logits in float32: nearer to float64 on the rounded factors than logits in bfloat16 are."""
    precision(False)
    leaves, fixed = kl_cases.draw(kl_cases.Case(3000, 5003, 256, 128), torch.float32, "cuda")
    leaves = {name: part.bfloat16().float() if part.dim() == 2 else part for name, part in leaves.items()}
    fixed |= {name: part.bfloat16().float() for name, part in fixed.items() if torch.is_tensor(part) and part.dim() == 2}

    def run(implementation, autocast, parts):
        inputs = {name: part.detach().clone().requires_grad_() for name, part in parts.items()}
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = kl_cases.call(implementation, **inputs, **fixed)
        return [loss, *torch.autograd.grad(loss, list(inputs.values()))]

    wanted = run(linear_kl.reference_kl, False, leaves)
    found = run(kl_kernel.linear_kl, True, leaves)
    assert abs(found[0] - wanted[0]) < 1e-5 * wanted[0]
    for ours, exact in zip(found[1:], wanted[1:], strict=True):
        assert ours.dtype == torch.float32 and (ours - exact).norm() < 4e-3 * exact.norm()


# matrix_orientation


@pytest.mark.parametrize(("form", "widest", "config"), list(shipped(orientation_kernel)))
def test_matrix_orientation(form, widest, config, precision):
    dtype, tf32 = FORMS[form]
    precision(tf32)
    run = forced(orientation_kernel.orientation_error, config=config)
    for time, packed, window, lag, softcap in ((200, True, 50, 16, 5.0), (2049, False, None, 0, None)):
        case = orientation_cases.Case(2, time, 4, 2, widest, widest, packed, window, lag)
        leaves, fixed = orientation_cases.draw(case, dtype, "cuda")
        check(run, matrix_orientation.reference_error, (leaves, fixed | {"softcap": softcap}), form)


@pytest.mark.parametrize("form", FORMS)
def test_matrix_orientation_at_odd_sizes(form, precision):
    dtype, tf32 = FORMS[form]
    precision(tf32)
    for time in LENGTHS:
        case = orientation_cases.Case(1, time, 2, 1, 40, 24, True, None, 0)
        draws = orientation_cases.draw(case, dtype, "cuda")
        check(orientation_kernel.orientation_error, matrix_orientation.reference_error, draws, form)


def test_matrix_orientation_of_a_long_text_in_little_memory():
    leaves, fixed = orientation_cases.draw(
        orientation_cases.Case(1, 32_768, 4, 4, 64, 64, False, None, 0), torch.bfloat16, "cuda"
    )
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    error, _ = orientation_kernel.orientation_error(**leaves, **fixed)
    error.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves.values())


# causal_conv


CONVOLUTIONS = [("bf16", 4, config) for config in conv_kernel.CONFIGS]
CONVOLUTIONS += [(form, width, conv_kernel.CONFIGS[0]) for form in ("bf16", "fp16", "fp32") for width in (2, 3, 4)]


@pytest.mark.parametrize(("form", "width", "config"), dict.fromkeys(CONVOLUTIONS), ids=str)
def test_causal_conv(form, width, config):
    run = forced(conv_kernel.causal_conv, config=config)
    for time in LENGTHS:
        case = conv_cases.Case(2, time, 200, width, "silu" if time != 200 else None, time == 2049)
        check(run, causal_conv.reference_conv, conv_cases.draw(case, FORMS[form][0], "cuda"), form)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("form", ["bf16", "fp16", "fp32"])
def test_causal_conv_step(form, width):
    leaves, fixed = conv_cases.draw(conv_cases.Case(3, 1, 200, width, "silu", False), FORMS[form][0], "cuda")
    wanted = causal_conv.reference_conv(**{name: leaf.double() for name, leaf in leaves.items()}, **fixed)
    with kernels.backend("triton"):
        found = causal_conv.causal_conv(**leaves, **fixed)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2)


def test_causal_conv_with_strides_beyond_32_bits():
    far = torch.zeros(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
    leaves, fixed = conv_cases.draw(conv_cases.Case(2, 65, 32, 4, "silu", False), torch.bfloat16, "cuda")
    for strides in ((2**31, 64, 1), (4096, 2**25, 1)):
        x = far.as_strided((2, 65, 32), strides)
        x.copy_(leaves["x"])
        assert torch.equal(
            conv_kernel.causal_conv(**leaves | {"x": x}, **fixed)[0], conv_kernel.causal_conv(**leaves, **fixed)[0]
        )


# gated_norm


@pytest.mark.parametrize("config", norm_kernel.CONFIGS, ids=str)
@pytest.mark.parametrize("form", ["bf16", "fp16", "fp32"])
def test_gated_norm(form, config):
    run = forced(norm_kernel.gated_norm, config=config)
    for time, channels, groups in ((1, 24, 3), (63, 200, 1), (2049, 1152, 9), (200, 8192, 1)):
        draws = norm_cases.draw(norm_cases.Case(2, time, channels, groups), FORMS[form][0], "cuda")
        check(run, gated_norm.reference_norm, draws, form)


# what the models do


def test_a_gpu_runs_the_kernels_unasked(caplog, monkeypatch):
    monkeypatch.setattr(kernels, "_logged", set())
    leaves, fixed = ssd_cases.draw(ssd_cases.Case(1, 10, 2, 2, 16, 16, False), torch.bfloat16, "cuda")
    with caplog.at_level("INFO"):
        ssd.ssd(**leaves, **fixed)
    assert "ssd runs on its triton implementation (cuda)" in caplog.text
