"""Shapes for tests of `gla`."""

from students.kernels.gla.inputs import Case, check, draw

__all__ = ["GPU", "TEST", "Case", "check", "draw"]

TEST = [
    Case(1, 1, 1, 4, 4, False),
    Case(2, 63, 2, 8, 4, False),
    Case(2, 64, 4, 4, 8, True),
    Case(1, 200, 3, 8, 16, True),
    Case(3, 129, 2, 16, 4, True),
]
GPU = [Case(2, 200, 4, 64, 64, True), Case(1, 2049, 2, 128, 128, False)]  # the second is long and wide
