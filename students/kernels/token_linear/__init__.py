"""One token of a few texts through several linear layers that read the same input, in one pass over their weights.

At one token the weights are all that has to move. The kernel reads them where they stand: no weight is held twice. What
comes before and after costs nothing beside them: the RMSNorm of the input, the gate of a SwiGLU, the residual.
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
MOST = 8  # sets of rows that one launch takes


class Rows(NamedTuple):
    """Rows of a linear layer, and their bias. wide: the product must not be rounded below float32."""

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
    """Each set of rows times the input, in one launch.

    Args:
        norm: weight and epsilon of an RMSNorm on x. residual: added to the outcome, of one set of rows alone. swiglu: two
            sets of rows, a gate and what it opens for: silu(gate) up is all that comes out. dtype: of the outcome (default:
            as it was computed, float32 or wider for rows that are wide). also: another input and as many rows of its own
            layer, their product added to the first set's.

    Returns:
        a tensor a set of rows; views of one.

    Raises:
        ValueError: a residual or another product beside several sets of rows, or a swiglu of other than two of one height.
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
        return f"one launch takes {MOST} sets of rows and one wide one, not {len(narrow)} and {len(wide)}"
    for part in rows:
        if part.weight.stride(1) != 1 or part.weight.stride(0) != part.weight.shape[1]:
            return "a weight does not stand row after row"
        if part.weight.dtype not in TYPES:
            return f"a weight is {part.weight.dtype}"
    if len({part.weight.dtype for part in narrow}) > 1:
        return "weights of several types"
    if len({part.bias.dtype for part in narrow if part.bias is not None}) > 1:
        return "biases of several types"
    return None


def split(x: Tensor, rows: Sequence[Rows]) -> tuple[list[Rows], list[Rows]]:
    """The sets of rows whose weights have the type of x, and the others."""
    same = [part for part in rows if part.weight.dtype == x.dtype]
    other = [part for part in rows if part.weight.dtype != x.dtype]
    return same, other
