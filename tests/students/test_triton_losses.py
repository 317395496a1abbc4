"""The Triton kernels of `linear_kl` and `matrix_orientation` against their references in float64, outputs and gradients."""

import pytest
import torch

from distill.benchmarks.check import relative_errors
from students import kernels
from students.kernels import linear_kl, matrix_orientation
from students.kernels.linear_kl import cases as kl_cases
from students.kernels.linear_kl import kernel as kl_kernel
from students.kernels.matrix_orientation import cases as orientation_cases
from students.kernels.matrix_orientation import kernel as orientation_kernel
from students.kernels.op import forced
from tests.students.triton_checks import DEVICE, check

pytestmark = [  # the interpreter works out both sides of a mask
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]


# linear_kl


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(
    ("temperature", "ce_weight", "softcap"), [(1.0, 0.0, None), (2.0, 0.3, None), (1.0, 0.0, 2.0), (1.0, 1.0, None)]
)
def test_linear_kl(divergence, temperature, ce_weight, softcap):
    leaves, fixed = kl_cases.draw(kl_cases.Case(5, 43, 8, 6), torch.float32, DEVICE)
    fixed |= {"divergence": divergence, "temperature": temperature, "ce_weight": ce_weight, "softcap": softcap, "scale": 0.7}
    fixed["targets"][0] = -100  # a place without a target

    def run(implementation, **options):
        return lambda **inputs: kl_cases.call(implementation, **inputs, **options)

    found = run(kl_kernel.linear_kl, rows=3, block=16)
    check(relative_errors(found, run(linear_kl.reference_kl), leaves, fixed))


def test_linear_kl_computes_in_the_type_of_autocast():
    """Products take bfloat16 factors; logits of hidden states in float32 are not rounded to it."""
    leaves, fixed = kl_cases.draw(kl_cases.Case(5, 43, 64, 32), torch.float32, DEVICE)

    def run(inputs):
        inputs = {name: leaf.detach().clone().requires_grad_() for name, leaf in inputs.items()}
        loss = kl_cases.call(kl_kernel.linear_kl, **inputs, **fixed, rows=3, block=16)
        loss.backward()
        return loss.detach(), {name: leaf.grad for name, leaf in inputs.items()}

    def rounded(parts):
        return {name: part.bfloat16().float() if part.dim() == 2 else part for name, part in parts.items()}

    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        loss, gradients = run(leaves)
    fixed |= rounded({name: part for name, part in fixed.items() if torch.is_tensor(part)})
    wanted, exact = run(rounded(leaves))
    torch.testing.assert_close(loss, wanted, rtol=2e-6, atol=0)
    for name, gradient in gradients.items():
        error = (gradient - exact[name]).norm() / exact[name].norm()
        assert gradient.dtype == torch.float32 and error < 4e-3, (name, error)


def test_linear_kl_hands_its_gradients_out_once():
    leaves, fixed = kl_cases.draw(kl_cases.Case(2, 7, 4, 4), torch.float32, DEVICE)
    leaves["hidden"].requires_grad_()
    with kernels.backend("triton"):
        loss = kl_cases.call(linear_kl.linear_kl, **leaves, **fixed)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="its backward pass cannot run twice"):
        loss.backward()


# matrix_orientation


@pytest.mark.parametrize(
    ("case", "softcap"),
    [
        (orientation_cases.Case(1, 1, 2, 1, 4, 4, False, None, 0), None),
        (orientation_cases.Case(1, 70, 2, 1, 8, 4, False, None, 0), None),
        (orientation_cases.Case(2, 63, 2, 1, 8, 4, True, None, 0), 3.0),
        (orientation_cases.Case(1, 100, 2, 2, 4, 20, True, 24, 0), None),
        (orientation_cases.Case(1, 90, 1, 1, 4, 8, False, 40, 16), 3.0),
    ],
    ids=str,
)
def test_matrix_orientation(case, softcap):
    leaves, fixed = orientation_cases.draw(case, torch.float32, DEVICE)
    run = forced(orientation_kernel.orientation_error, config=orientation_kernel.Config(32, 16, 4, 1))
    check(relative_errors(run, matrix_orientation.reference_error, leaves, fixed | {"softcap": softcap}))


def test_matrix_orientation_without_gradient_or_skip():
    leaves, fixed = orientation_cases.draw(orientation_cases.Case(1, 33, 1, 1, 4, 4, False, None, 0), torch.float32, DEVICE)
    leaves["D"] = None
    with torch.no_grad(), kernels.backend("triton"):
        found = matrix_orientation.orientation_error(**leaves, **fixed)
    with kernels.backend("reference"):
        wanted = matrix_orientation.orientation_error(**leaves, **fixed)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
