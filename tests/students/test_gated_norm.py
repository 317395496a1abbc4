"""The reference of `gated_norm` against its formula written out a group at a time, and what it refuses."""

import pytest
import torch

from students.kernels.gated_norm import cases, gated_norm


@pytest.mark.parametrize("case", cases.TEST, ids=str)
def test_reference_is_the_formula(case):
    leaves, fixed = cases.draw(case, torch.float64, "cpu")
    y, z, weight = leaves["y"], leaves["z"], leaves["weight"].double()
    width = case.c // case.g
    parts = []
    for start in range(0, case.c, width):
        g = (y * z / (1 + (-z).exp()))[..., start : start + width]
        parts.append(g / ((g**2).sum(-1, keepdim=True) / width + fixed["eps"]).sqrt() * weight[start : start + width])
    torch.testing.assert_close(gated_norm(y, z, weight, **fixed), torch.cat(parts, -1), rtol=1e-10, atol=1e-10)


def test_gradients():
    leaves, fixed = cases.draw(cases.TEST[1]._replace(t=3), torch.float64, "cpu")
    inputs = [leaf.double().requires_grad_() for leaf in leaves.values()]
    assert torch.autograd.gradcheck(lambda *tensors: gated_norm(*tensors, **fixed), inputs)


def test_unequal_groups_are_refused():
    y = torch.zeros(1, 1, 10)
    with pytest.raises(ValueError, match="10 channels cannot be cut into 3 equal groups"):
        gated_norm(y, y, y[0, 0], 3, 1e-5)
