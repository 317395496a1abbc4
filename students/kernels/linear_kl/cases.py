"""Shapes and random inputs for tests and benchmarks of `linear_kl`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from students.kernels.linear_kl import Head, reference_kl
from students.kernels.op import Op, Work


class Case(NamedTuple):
    """Tokens, vocabulary, student width, teacher width."""

    t: int
    v: int
    d: int
    e: int


TEST = [Case(1, 7, 4, 4), Case(63, 11, 8, 6), Case(1030, 5, 4, 4)]
BENCH = [Case(8192, 49152, 2048, 2048), Case(8192, 128256, 2048, 2048)]


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Draw random inputs by name: those that have a gradient, and the others. Logits have a standard deviation near 2."""
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    leaves = {
        "hidden": torch.randn(case.t, case.d, **options),
        "weight": torch.randn(case.v, case.d, **options) * 2 * case.d**-0.5,
        "bias": torch.randn(case.v, **options) * 0.1,
    }
    fixed = {
        "teacher_hidden": torch.randn(case.t, case.e, **options),
        "teacher_weight": torch.randn(case.v, case.e, **options) * 2 * case.e**-0.5,
        "weights": torch.rand(case.t, device=device) + 0.1,
        "targets": torch.randint(0, case.v, (case.t,), device=device),
        "divergence": "forward_kl",
        "temperature": 1.0,
        "ce_weight": 0.0,
        "scale": 1.0,
        "softcap": None,
    }
    return leaves, fixed


def call(
    implementation: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    scale: float,
    softcap: float | None,
    **rest: Any,
) -> Tensor:
    """Run an implementation on the inputs of `draw`."""
    head = Head(weight, bias, scale, softcap)
    return implementation(hidden, head, teacher_hidden=teacher_hidden, teacher_head=Head(teacher_weight), **rest)


def _draw_evenly(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
    """Draw inputs with equal weights of all tokens, as other projects' losses have."""
    leaves, fixed = draw(case, dtype, device)
    return leaves, fixed | {"weights": torch.ones_like(fixed["weights"])}


def _work(case: Case) -> Work:
    heads, cells = 2.0 * case.v * (case.d + case.e), 2.0 * case.t * case.v
    return Work((heads, cells * (case.d + case.e)), (2 * heads, cells * (3 * case.d + case.e)))


OPS = {
    "linear_kl": Op(
        BENCH,
        _draw_evenly,
        reference_kl,
        "students.kernels.linear_kl.kernel:linear_kl",
        _work,
        small=lambda case: case._replace(t=300, v=min(case.v, 9000), d=256, e=256),
        choices=lambda kernel, case, dtype: kernel.BLOCKS,
        without=("bias",),
        call=call,
        force_as="block",
        place=70,
    )
}
