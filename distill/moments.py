"""AdamW's two moments of a parameter: the bytes they take, and 8-bit moments (torchao) as plain tensors.

An 8-bit moment consists of codes (one byte a number), one scale for each block of numbers, and the map from codes to
values. A block lies within one row (of the first dimension). Processes that divide a parameter by rows so hold the same
blocks as one process would.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, cast

from torch import Tensor

from distill.compat import kept_in_float32
from students.skeleton import Student

EIGHT_BIT = "adamw_8bit"
SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # the moments by name, and whether they have a sign
PARTS = ("codes", "scale", "qmap")  # of an 8-bit moment
LEAST = 4096  # the smallest parameter, in numbers, that gets 8-bit moments, as in bitsandbytes and torchao
BLOCK, SMALLEST_BLOCK = 256, 32  # numbers that share a scale
MISSING = "needs torchao, which is not installed: pip install 'distill-hybrids[int8]'"


def check_installed() -> None:
    """Check that torchao's optimizers are installed.

    Raises:
        ImportError: they are not; it names the command that installs them.
    """
    if find_spec("torchao") is None:
        raise ImportError(MISSING)
    try:
        from torchao.optim import AdamW8bit  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{MISSING} (version 0.15 or newer; the one here says: {error})") from error


def block_of(shape: Sequence[int]) -> int | None:
    """The block size of a parameter's 8-bit moments: the largest divisor of its row length up to BLOCK.

    None if the moments stay float32: the parameter is small, or its row length has no divisor from SMALLEST_BLOCK to BLOCK
    (vectors, taps of convolutions).

    Args:
        shape: of the whole parameter, even if this process holds only some of its rows.
    """
    if math.prod(shape) < LEAST:
        return None
    row = math.prod(shape[1:])
    return next((size for size in range(min(BLOCK, row), SMALLEST_BLOCK - 1, -1) if row % size == 0), None)


def wide_names(student: Student, names: Collection[str]) -> set[str]:
    """Those of `names` whose moments always stay float32: parameters that mixers keep in float32, such as decays."""
    wide = kept_in_float32(student) | student.float32_names
    return {name for name in names if not wide.isdisjoint(name.split("."))}


def bytes_of(shape: Sequence[int], optimizer: str, wide: bool = False) -> int:
    """The bytes of one moment of a parameter, including scales."""
    count, block = math.prod(shape), None if wide or optimizer != EIGHT_BIT else block_of(shape)
    return 4 * count if block is None else count + 4 * count // block


def bytes_a_parameter(optimizer: str) -> float:
    """The bytes of both moments for each number of a matrix whose row length is a multiple of BLOCK."""
    return 2 * bytes_of((LEAST, BLOCK), optimizer) / (LEAST * BLOCK)


def begun(held: Tensor, shape: Sequence[int], wide: bool) -> dict[str, Tensor]:
    """The initial state of torchao's AdamW8bit for one parameter: zero moments and a step count of 0.

    Args:
        held: the rows of the parameter that this process holds, at least one. shape: of the whole parameter.
    """
    import torch
    from torchao.optim.subclass_8bit import OptimState8bit

    block = None if wide else block_of(shape)
    found = {"step": torch.tensor(0.0)}
    for name, signed in SIGNED.items():
        if block is None:
            found[name] = torch.zeros_like(held, requires_grad=False)
        else:
            found[name] = OptimState8bit.zeros(held.shape, signed, block, held.device, dtype=held.dtype)
    return found


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An optimizer's state of one parameter as plain tensors. An 8-bit moment becomes `exp_avg.codes` (of the parameter's
    shape), `exp_avg.scale` ([rows, blocks a row]) and `exp_avg.qmap` ([256]).

    The tensors are views: copying into them changes the state.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if hasattr(value, "codes"):
            found |= {f"{name}.{part}": getattr(value, part) for part in PARTS}
            found[f"{name}.scale"] = cast(Any, value).scale.view(value.shape[0], -1)
        else:
            found[name] = value
    return found


def by_rows(key: str) -> bool:
    """Whether a tensor of `plain` has one row for each row of its parameter."""
    return key != "step" and not key.endswith(".qmap")
