"""Where Triton kernels run in tests, and the errors that they may have."""

import torch

from distill.benchmarks.check import tolerance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(errors, dtype=torch.float32):
    assert errors and max(errors.values()) <= tolerance(dtype), errors
