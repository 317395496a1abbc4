"""Shapes for tests of `gated_delta_rule`."""

from students.kernels.gated_delta_rule.inputs import Case, check, draw

__all__ = ["GPU", "TEST", "Case", "check", "draw"]

TEST = [
    Case(1, 1, 1, 1, 4, 4, False),
    Case(2, 63, 4, 2, 8, 4, False),
    Case(2, 64, 4, 4, 4, 8, True),
    Case(1, 200, 6, 3, 8, 16, True),
    Case(3, 129, 2, 1, 16, 4, True),
]
GPU = [Case(2, 200, 4, 2, 64, 64, True), Case(1, 2049, 2, 2, 128, 128, False)]  # the second is long and wide
