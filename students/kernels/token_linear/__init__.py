"""Fused linear layers for decoding: one token per sequence of a small batch through several layers with the same input.

For one token, reading the weights dominates the time. The kernel reads them once and in place: no weight is copied. The
RMSNorm of the input, the gate of a SwiGLU and the residual are computed in the same launch at almost no cost.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from students.kernels import TYPES, Deferred, Implementations, pick
from students.kernels.token_linear.reference import token_linear as reference_linear
from students.shapes import Float

IMPLEMENTATIONS: Implementations = {
    "reference": reference_linear,
    "triton": Deferred("students.kernels.token_linear.kernel", "token_linear"),
}
CHECKED = {"token_linear": TYPES}  # types compared with float64 on a GPU
MOST = 8  # most sets of rows in one launch


class Rows(NamedTuple):
    """Rows of a linear layer's weight, and their bias. wide: compute the product in float32 or wider."""

    weight: Float[Tensor, "r d"]
    bias: Float[Tensor, " r"] | None = None
    wide: bool = False


def token_linear(
    x: Float[Tensor, "b d"],
    rows: Sequence[Rows],
    *,
    norm: tuple[Float[Tensor, " d"], float] | None = None,
    residual: Float[Tensor, "b r"] | None = None,
    swiglu: bool = False,
    dtype: torch.dtype | None = None,
    also: tuple[Float[Tensor, "b e"], Rows] | None = None,
) -> list[Float[Tensor, "b _"]]:
    """Multiply the input by each set of rows, in one launch.

    Args:
        norm: weight and epsilon of an RMSNorm on x. residual: added to the output; only with one set of rows. swiglu: the
            two sets of rows are gate and up, and the only output is silu(gate) up. dtype: type of the output (default: the
            type of the computation, float32 or wider for wide rows). also: another input and the r rows of its own layer,
            whose product is added to the output; only with one set of rows.

    Returns:
        one tensor per set of rows; they may be views of one tensor.

    Raises:
        ValueError: a residual or `also` with several sets of rows, or swiglu without two sets of rows of one shape.
    """
    if (residual is not None or also is not None) and len(rows) != 1:
        raise ValueError(f"a residual or another product is added to one set of rows, not to {len(rows)}")
    if swiglu and (len(rows) != 2 or rows[0].weight.shape != rows[1].weight.shape):
        raise ValueError(f"a SwiGLU has two sets of rows of one shape, not {[tuple(part.weight.shape) for part in rows]}")
    given = rows if also is None else [*rows, also[1]]
    run = pick("token_linear", IMPLEMENTATIONS, x, lambda: _refusal(x, given), checked=CHECKED["token_linear"])
    return run(x, rows, norm, residual, swiglu, dtype, also)


def _refusal(x: Tensor, rows: Sequence[Rows]) -> str | None:
    narrow, wide = split(x, rows)
    if len(narrow) > MOST or len(wide) > 1 or not narrow:
        return f"one launch takes 1 to {MOST} sets of rows and at most one wide set, not {len(narrow)} and {len(wide)}"
    for part in rows:
        if part.weight.stride(1) != 1 or part.weight.stride(0) != part.weight.shape[1]:
            return "a weight is not contiguous"
        if part.weight.dtype not in TYPES:
            return f"a weight is {part.weight.dtype}"
    if len({part.weight.dtype for part in narrow}) > 1:
        return "the weights have several types"
    if len({part.bias.dtype for part in narrow if part.bias is not None}) > 1:
        return "the biases have several types"
    return None


def split(x: Tensor, rows: Sequence[Rows]) -> tuple[list[Rows], list[Rows]]:
    """Split the sets of rows into those whose weights have the type of x, and the others."""
    same = [part for part in rows if part.weight.dtype == x.dtype]
    other = [part for part in rows if part.weight.dtype != x.dtype]
    return same, other
