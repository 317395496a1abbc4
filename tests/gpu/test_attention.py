"""`make test-gpu`: attention, every shipped configuration against float64 at odd lengths, in every type."""

import pytest
import torch

from students.kernels import attention
from students.kernels.attention import cases, decode
from students.kernels.attention import kernel as attention_kernel
from students.kernels.attention.cases import Case
from students.kernels.op import forced
from tests.gpu.test_kernels import FORMS, check, precision, shipped

pytestmark = pytest.mark.gpu

__all__ = ["precision"]  # a fixture
KINDS = {  # window, sinks, packed, soft cap
    "window": (64, 4, True, None),
    "long": (1024, 4, True, None),
    "capped": (300, 0, True, 30.0),
    "whole": (None, 0, True, None),
    "plain": (None, 0, False, None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("form", "widest", "config"), list(shipped(attention_kernel)))
def test_attention(form, widest, config, kind, precision):
    dtype, tf32 = FORMS[form]
    precision(tf32)
    run = forced(attention_kernel.attention, config=config)
    for time in (63, 200, 2049):
        width = widest - 8 if time == 200 else widest
        case = Case(2, time, 4, 2, width, *KINDS[kind])
        check(run, attention.reference_attention, cases.draw(case, dtype, "cuda"), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("window", "sinks"), [(1, 1), (7, 4), (64, 64), (100, 3), (2000, 0)])
def test_attention_with_odd_windows(form, window, sinks, precision):
    dtype, tf32 = FORMS[form]
    precision(tf32)
    for packed in (False, True):
        case = Case(2, 700, 6, 3, 40, window, sinks, packed)
        check(attention_kernel.attention, attention.reference_attention, cases.draw(case, dtype, "cuda"), form)


@pytest.mark.parametrize("form", FORMS)
def test_attention_with_the_most_sinks(form, precision):
    dtype, tf32 = FORMS[form]
    precision(tf32)
    for width, most in ((64, 256), (128, 130), (256, 70)):
        for before in (0, 100):
            case = Case(1, 300, 2, 1, width, 64, most, True, before=before)
            check(attention_kernel.attention, attention.reference_attention, cases.draw(case, dtype, "cuda"), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", [1, 37, 700])
def test_attention_behind_a_prompt(form, before, precision):
    dtype, tf32 = FORMS[form]
    precision(tf32)
    for window, sinks in ((64, 4), (300, 2), (None, 0)):
        case = Case(2, 150, 4, 2, 64, window, sinks, True, before=before)
        check(attention_kernel.attention, attention.reference_attention, cases.draw(case, dtype, "cuda"), form)


@pytest.mark.parametrize(("form", "widest", "config"), list(shipped(decode)))
def test_attention_to_places(form, widest, config, precision):
    """In whole texts, windows on rings, behind padding, with masks; the newest keys at their places or beside them."""
    dtype, tf32 = FORMS[form]
    precision(tf32)
    run = forced(decode.attend_places, config=config)
    for case in (
        cases.Places(2, 1, 8, 2, widest, 5000, text=4100),
        cases.Places(2, 1, 32, 8, widest, 1024, 1024, padded=True, text=9000),
        cases.Places(3, 4, 12, 3, widest - 8, 700, text=650),
        cases.Places(2, 2, 6, 6, widest, 300, masked=True, padded=True, softcap=20.0),
    ):
        check(run, attention.reference_places, cases.draw_places(case, dtype, "cuda"), form)


MANY = cases.Places(9000, 1, 16, 8, 16, 20, text=17)  # 72,000 pairs of texts and heads: more than a grid's second axis holds


@pytest.mark.parametrize("case", [*cases.TEST_PLACES, *cases.BENCH_PLACES[:2], MANY], ids=str)
def test_shares_of_places_are_joined_to_the_same_bits(case):
    _, fixed = cases.draw_places(case, torch.bfloat16, "cuda")
    first = decode.attend_places(**fixed)
    wide = {
        name: part.double() if torch.is_tensor(part) and part.is_floating_point() else part for name, part in fixed.items()
    }
    torch.testing.assert_close(first.double(), attention.reference_places(**wide), rtol=3e-2, atol=3e-2)
    assert all(torch.equal(decode.attend_places(**fixed), first) for _ in range(3))


@pytest.mark.parametrize("form", FORMS)
def test_one_token(form):
    """Its weight is 1 whatever q and k are: their gradients are nothing."""
    leaves, fixed = cases.draw(Case(2, 1, 4, 2, 64, 64, 4), FORMS[form][0], "cuda")
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    y = attention_kernel.attention(**leaves, **fixed)
    torch.testing.assert_close(y, leaves["v"].repeat_interleave(2, 2), rtol=1e-3, atol=1e-3)  # products may be tf32
    dq, dk, _ = torch.autograd.grad(y.float().sum(), list(leaves.values()))
    assert dq.abs().max() < 0.1 and dk.abs().max() < 0.1


def test_the_same_bits_twice():
    leaves, fixed = cases.draw(Case(2, 1500, 8, 2, 64, 64, 4, True), torch.bfloat16, "cuda")
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    results = []
    for _ in range(2):
        y = attention_kernel.attention(**leaves, **fixed)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_long_text_in_little_memory():
    """65,536 tokens: a mask of them alone would be 4 GiB."""
    leaves, fixed = cases.draw(Case(1, 65_536, 4, 2, 64, 64, 4, True), torch.bfloat16, "cuda")
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = attention_kernel.attention(**leaves, **fixed)
    grads = torch.autograd.grad(y.float().sum(), list(leaves.values()))
    assert torch.cuda.max_memory_allocated() - before < 2**29
    half = {name: leaf[:, -2000:].detach() for name, leaf in leaves.items()}
    documents = fixed["documents"][:, -2000:]
    first = int((documents[0] != documents[0, 0]).nonzero()[0])  # from here on the last rows need nothing before
    places = {"documents": documents, "positions": fixed["positions"][:, -2000:]}
    wanted = attention.reference_attention(**{name: part.double() for name, part in half.items()}, **{**fixed, **places})
    torch.testing.assert_close(y[:, -2000:][:, first:].double(), wanted[:, first:], rtol=3e-2, atol=3e-2)
    assert all(part.isfinite().all() for part in grads)


def test_strides_beyond_32_bits():
    far = torch.zeros(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
    leaves, fixed = cases.draw(Case(2, 65, 2, 2, 16, 16, 2), torch.bfloat16, "cuda")
    wanted = attention_kernel.attention(**leaves, **fixed)
    for strides in ((2**31, 64, 32, 1), (4096, 2**25, 32, 1)):
        k = far.as_strided((2, 65, 2, 16), strides)
        k.copy_(leaves["k"])
        assert torch.equal(attention_kernel.attention(**leaves | {"k": k}, **fixed), wanted)


def test_gradients_do_not_depend_on_the_layout_of_the_outputs_gradient():
    """cuDNN's do, in PyTorch 2.11 (LOG.md, 27 Nov 2026): here on the reference, a window and whole."""
    for case in (Case(2, 256, 2, 2, 64, 64, 4), Case(2, 256, 2, 2, 64, None, 0)):
        leaves, fixed = cases.draw(case, torch.bfloat16, "cuda")
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        direction = torch.randn(2, 256, 2, 64, device="cuda", dtype=torch.bfloat16)
        found = []
        for width in (2, 4, 2):
            wide = torch.zeros(2, 256, width, 64, device="cuda", dtype=torch.bfloat16)
            wide[:, :, :2] = direction
            y = attention.reference_attention(**leaves, **fixed)
            found.append(torch.autograd.grad(y, list(leaves.values()), wide[:, :, :2]))
        for other in found[1:]:
            for part, first in zip(other, found[0], strict=True):
                torch.testing.assert_close(part, first, rtol=2e-2, atol=2e-2)
