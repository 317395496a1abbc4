"""The ops that are timed: their cases, how they are called, and the least work each case is.

To add one: its cases.py (BENCH and draw) and a line in OPS. Bytes and FLOP are those that any kernel must spend: each
input read once, each output written once, nothing recomputed, the masked half of a square left out.
"""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from students.kernels.causal_conv import cases as conv
from students.kernels.causal_conv import reference_conv
from students.kernels.gated_norm import cases as norm
from students.kernels.gated_norm import reference_norm
from students.kernels.linear_kl import cases as kl
from students.kernels.linear_kl import reference_kl
from students.kernels.linear_scan import cases as linear
from students.kernels.linear_scan import reference_scan as reference_linear
from students.kernels.linear_scan import reference_step as reference_linear_step
from students.kernels.matrix_orientation import cases as orientation
from students.kernels.matrix_orientation import reference_error
from students.kernels.selective_scan import cases as selective
from students.kernels.selective_scan import reference_scan as reference_selective
from students.kernels.selective_scan import reference_step as reference_selective_step
from students.kernels.ssd import cases as scan
from students.kernels.ssd import reference_ssd, reference_step

SQUARE = 64  # tokens of the squares that SSD's arithmetic is counted with


class Work(NamedTuple):
    """(bytes, FLOP) of the forward pass and of both passes, inputs in 2-byte types."""

    forward: tuple[float, float]
    both: tuple[float, float]


class Op(NamedTuple):
    """One op: its cases and inputs, reference and kernel ("module:function"), its work, what is special about calling it."""

    cases: list
    draw_all: Callable
    reference: Callable
    target: str
    work: Callable[..., Work]
    small: Callable  # a case -> one whose float64 reference is quick
    configs: Callable  # (case, type) -> shipped configurations, the default first
    without: tuple[str, ...] = ()  # inputs that a benchmark leaves out: states carried from elsewhere
    call: Callable | None = None
    force_as: str = "config"
    backward: bool = True

    def kernel(self) -> Callable:
        """The Triton implementation."""
        module, _, name = self.target.partition(":")
        return getattr(import_module(module), name)

    def draw(self, case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
        """Inputs of a case: those with gradients, and the others."""
        leaves, fixed = self.draw_all(case, dtype, device)
        return {k: v for k, v in leaves.items() if k not in self.without}, fixed | dict.fromkeys(self.without)

    def adapted(self, function: Callable) -> Callable:
        """`function` as a call on what `draw` returns."""
        return function if self.call is None else lambda **inputs: self.call(function, **inputs)

    def force(self, config) -> dict:
        """The keyword that makes the kernel use a configuration."""
        return {} if config is None else {self.force_as: config}


def forced(function: Callable, **options) -> Callable:
    """`function` with some keywords fixed."""
    return lambda *arguments, **inputs: function(*arguments, **inputs, **options)


def _scan_work(case) -> Work:
    tokens, (h, g, p, n) = case.b * case.t, case[2:6]
    forward = (tokens * (4 * h * p + 4 * g * n + 4 * h), tokens * (g * SQUARE * n + h * (SQUARE * p + 4 * n * p)))
    back = (tokens * (6 * h * p + 8 * g * n + 8 * h), tokens * (3 * g * SQUARE * n + h * (2 * SQUARE * p + 10 * n * p)))
    return Work(forward, (forward[0] + back[0], forward[1] + back[1]))


def _step_work(case) -> Work:
    size = 2.0 * 4 * case.b * case.h * case.p * case.n
    return Work((size, 5.0 * case.b * case.h * case.p * case.n), (size, 0.0))


def _conv_work(case) -> Work:
    stream = 2.0 * case.b * case.t * case.c
    return Work((2 * stream, stream * case.w), (5 * stream, 4 * stream * case.w))


def _linear_work(case) -> Work:
    cells = float(case.b * case.t * case.d)
    return Work((3 * 2 * cells, 2 * cells), ((3 + 5) * 2 * cells, 6 * cells))


def _linear_step_work(case) -> Work:
    cells = float(case.b * case.d)
    return Work(((3 * 2 + 2 * 4) * cells, 2 * cells), (0.0, 0.0))


def _selective_work(case) -> Work:
    """Its true floor is neither: b t d n exponentials, 16 a clock on a multiprocessor (3.7e12 a second on an H100)."""
    tokens, rows = float(case.b * case.t), 2.0 * case.g * case.n
    states = tokens * case.d * case.n
    forward, back = tokens * 2 * (3 * case.d + rows), tokens * 2 * (5 * case.d + 2 * rows)
    return Work((forward, 6 * states), (forward + back, 24 * states))


def _selective_step_work(case) -> Work:
    states = float(case.b * case.d * case.n)
    size = 2 * 4 * states + 4.0 * case.d * case.n + 2.0 * case.b * (3 * case.d + 2 * case.g * case.n)
    return Work((size, 6 * states), (0.0, 0.0))


def _linear_configs(case, dtype: torch.dtype) -> list:
    """The default depends on how many blocks the case makes."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        like = torch.empty(case.b, 1, case.d, dtype=dtype)
    return _kernel("linear_scan").configs(like, like)


def _orientation_work(case) -> Work:
    squares, rows = float(case.b * case.h * case.t**2), case.b * case.t
    inputs = 2.0 * rows * (case.h * (case.d + 2 * case.n) + case.kv * case.d)
    gradients = 2.0 * rows * case.h * 2 * case.n
    return Work((inputs, squares * (case.d + case.n)), (inputs + gradients, squares * (2 * case.d + 4 * case.n)))


def _norm_work(case) -> Work:
    stream = 2.0 * case.b * case.t * case.c
    return Work((3 * stream, 5 * stream), (8 * stream, 15 * stream))


def _kl_work(case) -> Work:
    heads, cells = 2.0 * case.v * (case.d + case.e), 2.0 * case.t * case.v
    return Work((heads, cells * (case.d + case.e)), (2 * heads, cells * (3 * case.d + case.e)))


def _kl_draw(case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Every token weighs the same, as in the peers."""
    leaves, fixed = kl.draw(case, dtype, device)
    return leaves, fixed | {"weights": torch.ones_like(fixed["weights"])}


def _kernel(op: str):
    return import_module(f"students.kernels.{op}.kernel")


OPS = {
    "ssd": Op(
        scan.BENCH, scan.draw, reference_ssd, "students.kernels.ssd.kernel:ssd", _scan_work,
        small=lambda case: case._replace(b=1, t=min(case.t, 1000)),
        configs=lambda case, dtype: _kernel("ssd").configs(dtype, case.n, case.p), without=("initial_state",),
    ),
    "ssd_step": Op(
        scan.BENCH_STEP, scan.draw_step, reference_step, "students.kernels.ssd.kernel:ssd_step", _step_work,
        small=lambda case: case._replace(b=2), configs=lambda case, dtype: [None], backward=False,
    ),
    "causal_conv": Op(
        conv.BENCH, conv.draw, reference_conv, "students.kernels.causal_conv.kernel:causal_conv", _conv_work,
        small=lambda case: case._replace(b=1, t=min(case.t, 1000)),
        configs=lambda case, dtype: _kernel("causal_conv").CONFIGS, without=("initial",),
    ),
    "linear_scan": Op(
        linear.BENCH, linear.draw, reference_linear, "students.kernels.linear_scan.kernel:linear_scan", _linear_work,
        small=lambda case: case._replace(b=1, t=min(case.t, 1000)),
        configs=_linear_configs, without=("initial_state",),
    ),
    "linear_scan_step": Op(
        linear.BENCH_STEP, linear.draw_step, reference_linear_step, "students.kernels.linear_scan.kernel:linear_scan_step",
        _linear_step_work, small=lambda case: case._replace(b=2), configs=lambda case, dtype: [None], backward=False,
    ),
    "selective_scan": Op(
        selective.BENCH, selective.draw, reference_selective, "students.kernels.selective_scan.kernel:selective_scan",
        _selective_work, small=lambda case: case._replace(b=1, t=min(case.t, 1000)),
        configs=lambda case, dtype: _kernel("selective_scan").configs(case.n), without=("initial_state",),
    ),
    "selective_scan_step": Op(
        selective.BENCH_STEP, selective.draw_step, reference_selective_step,
        "students.kernels.selective_scan.step:selective_scan_step", _selective_step_work,
        small=lambda case: case._replace(b=2), configs=lambda case, dtype: [None], backward=False,
    ),
    "matrix_orientation": Op(
        orientation.BENCH, orientation.draw, reference_error,
        "students.kernels.matrix_orientation.kernel:orientation_error", _orientation_work,
        small=lambda case: case._replace(b=1, t=min(case.t, 1000)),
        configs=lambda case, dtype: _kernel("matrix_orientation").configs(dtype, max(case.d, case.n)),
    ),
    "gated_norm": Op(
        norm.BENCH, norm.draw, reference_norm, "students.kernels.gated_norm.kernel:gated_norm", _norm_work,
        small=lambda case: case._replace(b=1, t=min(case.t, 1000)),
        configs=lambda case, dtype: _kernel("gated_norm").CONFIGS,
    ),
    "linear_kl": Op(
        kl.BENCH, _kl_draw, reference_kl, "students.kernels.linear_kl.kernel:linear_kl", _kl_work,
        small=lambda case: case._replace(t=300, v=min(case.v, 9000), d=256, e=256),
        configs=lambda case, dtype: list(_kernel("linear_kl").BLOCKS), without=("bias",),
        call=kl.call, force_as="block",
    ),
}  # fmt: skip
