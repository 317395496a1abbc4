"""A student of each layout, and text for it."""

import pytest
import torch

from tests.ecosystem.layouts import LAYOUTS, student_of

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def student(teacher, layout):
    """A student of the tiny teacher."""
    return student_of(teacher, layout)


@pytest.fixture
def ids():
    """Two rows of text."""
    return torch.randint(1, 320, (2, 13))


@pytest.fixture
def same():
    """Whether logits are the same but for the order of sums."""

    def compare(found, wanted, tolerance=1e-4):
        assert torch.isfinite(found).all()
        error = ((found - wanted).norm() / wanted.norm()).item()
        assert error <= tolerance, f"relative error {error:.2e}"

    return compare
