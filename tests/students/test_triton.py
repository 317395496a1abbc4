"""Triton kernels against their references in float64, outputs and all gradients: in the interpreter where there is no GPU.

Shapes are small and tiles are too, so that several tiles, chunks and segments meet. The interpreter cannot multiply
bfloat16 tiles: tests/gpu does that, with the tiles that are shipped.
"""

import logging
from dataclasses import replace

import pytest
import torch

from distill.benchmarks.check import relative_errors
from students import kernels
from students.cache import MixerState
from students.kernels import attention, causal_conv, gated_norm, ssd
from students.kernels.causal_conv import cases as conv_cases
from students.kernels.causal_conv import kernel as conv_kernel
from students.kernels.gated_norm import cases as norm_cases
from students.kernels.gated_norm import kernel as norm_kernel
from students.kernels.op import all_ops, forced
from students.kernels.ssd import cases as ssd_cases
from students.kernels.ssd import kernel as ssd_kernel
from tests.students.mixer_cases import context, made, packed
from tests.students.op_checks import tiny
from tests.students.triton_checks import DEVICE, check

pytestmark = [  # the interpreter works out both sides of a mask
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]


@pytest.mark.parametrize("name", all_ops())
def test_every_kernel_as_it_is_called(name):
    op = all_ops()[name]
    draws = op.draw(tiny(op), torch.float32, DEVICE)
    check(relative_errors(op.adapted(op.kernel()), op.adapted(op.reference), *draws))


# ssd


SMALL = ssd_kernel.Config(32, 16, 4, 1, 4, 1)


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(
    "case",
    [
        ssd_cases.Case(1, 1, 1, 1, 4, 4, False),
        ssd_cases.Case(2, 63, 4, 2, 8, 4, False),
        ssd_cases.Case(1, 100, 2, 1, 20, 24, True),  # two slices of values, neither tile full
        ssd_cases.Case(2, 130, 2, 2, 8, 16, True),
    ],
    ids=str,
)
def test_ssd(case, segments):
    run = forced(ssd_kernel.ssd, config=SMALL, segments=segments)
    check(relative_errors(run, ssd.reference_ssd, *ssd_cases.draw(case, torch.float32, DEVICE)))


def test_ssd_in_half_precision():
    run = forced(ssd_kernel.ssd, config=SMALL)
    case = ssd_cases.Case(1, 70, 2, 1, 8, 8, True)
    check(relative_errors(run, ssd.reference_ssd, *ssd_cases.draw(case, torch.float16, DEVICE)), torch.float16)


def test_ssd_from_views_without_a_state():
    """Inputs cut out of one tensor, as a mixer cuts them, and no gradient asked for."""
    joined = torch.randn(2, 40, 2 * 8 + 2 * 2 * 4, device=DEVICE)
    x, B, C = joined.split([16, 8, 8], -1)
    x, B, C = x.unflatten(-1, (2, 8)), B.unflatten(-1, (2, 4)), C.unflatten(-1, (2, 4))
    log_a = -torch.rand(2, 2, 40, device=DEVICE).transpose(1, 2)
    with kernels.backend("triton"):
        found = ssd.ssd(x, log_a, B, C)
    with kernels.backend("reference"):
        wanted = ssd.ssd(x.double(), log_a.double(), B.double(), C.double())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


def test_ssd_survives_decay_to_nothing():
    leaves, fixed = ssd_cases.draw(ssd_cases.Case(1, 40, 2, 2, 4, 4, True), torch.float32, DEVICE)
    leaves["log_a"] = torch.full_like(leaves["log_a"], -300.0)
    run = forced(ssd_kernel.ssd, config=SMALL)
    errors = relative_errors(run, ssd.reference_ssd, leaves, fixed)
    del errors["gradient of log_a"]  # it is nothing: no relative error
    check(errors)
    leaves["log_a"].requires_grad_()
    run(**leaves, **fixed)[0].sum().backward()
    assert leaves["log_a"].grad.abs().max() < 1e-4


def test_ssd_gives_a_gradient_of_the_state_alone():
    leaves, _ = ssd_cases.draw(ssd_cases.Case(1, 40, 2, 2, 4, 4, False), torch.float32, DEVICE)

    def final(run):
        return lambda **inputs: run(**inputs)[1]

    fixed = {"documents": None}
    check(relative_errors(final(forced(ssd_kernel.ssd, config=SMALL)), final(ssd.reference_ssd), leaves, fixed))


@pytest.mark.parametrize("state_type", [torch.float32, torch.float16])
def test_ssd_step(state_type):
    x, log_a = torch.randn(3, 4, 20, device=DEVICE), -torch.rand(3, 4, device=DEVICE)
    B, C = torch.randn(3, 2, 6, device=DEVICE), torch.randn(3, 2, 6, device=DEVICE)
    state = torch.randn(3, 4, 20, 6, device=DEVICE).to(state_type)
    wanted = ssd.reference_step(x.double(), log_a.double(), B.double(), C.double(), state.double())
    with kernels.backend("triton"):
        y, after = ssd.ssd_step(x, log_a, B, C, state)
    assert after.data_ptr() == state.data_ptr()
    torch.testing.assert_close(y.double(), wanted[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(state.double(), wanted[1], rtol=0, atol=1e-5 if state_type == torch.float32 else 5e-3)


# causal_conv


@pytest.mark.parametrize("carried", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        conv_cases.Case(1, 1, 3, 4, None, False),
        conv_cases.Case(2, 37, 20, 4, "silu", False),
        conv_cases.Case(2, 25, 5, 2, "silu", True),
        conv_cases.Case(1, 33, 7, 3, None, True),
        conv_cases.Case(1, 37, 7, 4, "silu", True),
    ],
    ids=str,
)
def test_causal_conv(case, carried):
    leaves, fixed = conv_cases.draw(case, torch.float32, DEVICE)
    if not carried:
        del leaves["initial"]
        fixed["initial"] = None
    run = forced(conv_kernel.causal_conv, config=conv_kernel.Config(16, 1, 2, 1))
    check(relative_errors(run, causal_conv.reference_conv, leaves, fixed))


@pytest.mark.parametrize("carried", [True, False])
def test_causal_conv_step(carried):
    leaves, fixed = conv_cases.draw(conv_cases.Case(3, 1, 20, 4, "silu", False), torch.float32, DEVICE)
    leaves["initial"] = leaves["initial"] if carried else None
    with kernels.backend("triton"):
        found = causal_conv.causal_conv(**leaves, **fixed)
    with kernels.backend("reference"):
        wanted = causal_conv.causal_conv(**leaves, **fixed)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


# a mixer, whole


@pytest.mark.parametrize(
    ("name", "options"), [("mamba2", {}), ("discrete_mamba2", {"lag": 3}), ("mamba1", {}), ("rg_lru", {})]
)
def test_a_mixer_runs_alike_on_both(name, options):
    """Training on packed documents, then a prompt and two steps from its state."""
    mixer, h, _ = made(name, options, dtype=torch.float32)
    mixer, h, documents = mixer.to(DEVICE), h[:, 20:44].to(DEVICE), packed()[:, 20:].to(DEVICE)
    results = []
    for backend in ("triton", "reference"):
        with kernels.backend(backend):
            trained = mixer(h, _context(documents, None, 0, 24))
            gradients = torch.autograd.grad(trained.square().sum(), list(mixer.parameters()), allow_unused=True)
            state = MixerState()
            with torch.no_grad():
                generated = [mixer(h[:, a:b], _context(documents, state, a, b)) for a, b in ((0, 22), (22, 23), (23, 24))]
        results.append([trained, *(part for part in gradients if part is not None), *generated])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp_min(1.0)


def _context(*arguments):
    made_here = context(*arguments)
    return replace(made_here, rope=tuple(table.to(DEVICE) for table in made_here.rope))


# gated_norm


@pytest.mark.parametrize("case", norm_cases.TEST, ids=str)
@pytest.mark.parametrize("config", [norm_kernel.CONFIGS[0], norm_kernel.Config(64, 2, 3, 1)], ids=str)
def test_gated_norm(case, config):
    run = forced(norm_kernel.gated_norm, config=config)
    check(relative_errors(run, gated_norm.reference_norm, *norm_cases.draw(case, torch.float32, DEVICE)))


# the switch


def test_the_log_names_what_runs_and_why(caplog, monkeypatch):
    monkeypatch.setattr(kernels, "_logged", set())
    x, weight = torch.randn(1, 4, 3, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    with caplog.at_level(logging.INFO), kernels.backend("triton"):
        causal_conv.causal_conv(x, weight)
    assert "causal_conv runs on its triton implementation" in caplog.text
    monkeypatch.setenv("DISTILL_KERNELS", "reference")
    with caplog.at_level(logging.INFO):
        causal_conv.causal_conv(x, weight)
    assert "causal_conv runs on its reference implementation" in caplog.text
    monkeypatch.setenv("DISTILL_KERNELS", "fast")
    with pytest.raises(ValueError, match="DISTILL_KERNELS='fast' does not exist"):
        causal_conv.causal_conv(x, weight)


def test_a_forced_kernel_refuses_what_it_cannot_do(monkeypatch):
    x, weight = torch.randn(1, 6, 3, device=DEVICE), torch.randn(3, 5, device=DEVICE)
    wide = torch.randn(1, 2, 1, 300, device=DEVICE)
    with kernels.backend("triton"):
        with pytest.raises(ValueError, match="a width of 5 is none of"):
            causal_conv.causal_conv(x, weight)
        with pytest.raises(ValueError, match="not float64"):
            causal_conv.causal_conv(x.double(), weight[:, :4])
        with pytest.raises(ValueError, match="300 values and 300 states is wider than 256"):
            ssd.ssd(wide, wide[..., 0], wide, wide)
        with pytest.raises(ValueError, match="has no gradient"):
            state = torch.zeros(1, 1, 4, 4, device=DEVICE, requires_grad=True)
            ssd.ssd_step(wide[:, 0, :, :4], wide[:, 0, :, 0], wide[:, 0, :, :4], wide[:, 0, :, :4], state)
        with pytest.raises(ValueError, match="decoding kernel has no gradient"):
            attention.attend_places(*(part.requires_grad_() for part in torch.randn(3, 1, 1, 1, 8, device=DEVICE)), scale=1)
        with pytest.raises(ValueError, match="1 queries of 129 heads per key head are more than 128"):
            attention.attend_places(wide[:, :1].expand(1, 1, 129, 300), wide[:, :1], wide[:, :1], scale=1)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match="without a GPU it needs TRITON_INTERPRET=1"):
                causal_conv.causal_conv(x, weight[:, :4])


def test_a_copy_without_the_kernels_says_so():
    x = torch.randn(1, 6, 3, device=DEVICE)
    table = {"reference": causal_conv.reference_conv, "triton": kernels.Deferred("students_kernels_elsewhere.kernel", "x")}
    with kernels.backend("triton"), pytest.raises(ValueError, match=r"students_kernels_elsewhere\.kernel is not installed"):
        kernels.pick("causal_conv", table, x)
    assert kernels.pick("causal_conv", table, x) is causal_conv.reference_conv
