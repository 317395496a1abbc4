"""Errors of an implementation against its reference in float64: outputs and every gradient, on the same inputs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# The largest ||found - wanted|| / ||wanted|| of a correct kernel, by the dtype of its products.
TOLERANCE = {"float32": 5e-5, "tf32": 4e-3, "float16": 5e-3, "bfloat16": 2e-2}


def tolerance(dtype: torch.dtype, tf32: bool = False) -> float:
    """The tolerance of a kernel whose inputs have this dtype."""
    return TOLERANCE["tf32" if tf32 and dtype == torch.float32 else str(dtype).removeprefix("torch.")]


def relative_errors(
    function: Callable, reference: Callable, leaves: Mapping[str, Tensor], fixed: Mapping[str, Any]
) -> dict[str, float]:
    """Relative errors (Frobenius norm) of `function(**leaves, **fixed)` against `reference` on float64 copies.

    Outputs are called output 0, 1 ..., gradients by their input. Outputs that `function` lacks are not compared.
    """
    wide = {name: value.double() if _is_float(value) else value for name, value in fixed.items()}  # before one is changed
    found, directions = _with_gradients(function, leaves, fixed, None)
    wanted, _ = _with_gradients(reference, {name: leaf.double() for name, leaf in leaves.items()}, wide, directions)
    wanted = {name: part for name, part in wanted.items() if name in found or name.startswith("gradient")}
    nothing = torch.zeros((), device=next(iter(found.values())).device)  # a gradient that one of the graphs does not reach
    return {name: relative_error(found.get(name, nothing), wanted.get(name, nothing)) for name in found | wanted}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||, with ||wanted|| at least 1e-6 sqrt(n) for n elements; NaN counts as infinite."""
    wanted = wanted.double()
    error = (found.double() - wanted).norm() / wanted.norm().clamp_min(1e-6 * max(wanted.numel(), 1) ** 0.5)
    return float(torch.nan_to_num(error, nan=float("inf")))


def _with_gradients(function, leaves, fixed, directions):
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    outputs = function(**leaves, **fixed)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = {f"output {index}": part for index, part in enumerate(outputs)}
    differentiable = {name: part for name, part in outputs.items() if part.requires_grad}
    if not differentiable:
        return outputs, {}
    if directions is None:
        directions = {name: _direction(part) for name, part in differentiable.items()}
    loss = sum(
        (part.to(_wide(part)) * directions[name].to(_wide(part))).sum()
        for name, part in differentiable.items()
        if name in directions
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named = {f"gradient of {name}": part for name, part in zip(leaves, gradients, strict=True) if part is not None}
    return {name: part.detach() for name, part in outputs.items()} | named, directions


def _direction(output: Tensor) -> Tensor:
    """The weights of an output in the loss: random, but 1 for a scalar, which may underflow in half precision if scaled."""
    return torch.randn_like(output, dtype=torch.float32) if output.dim() else torch.ones((), device=output.device)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
