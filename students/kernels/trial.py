"""Trials of other projects' kernels: a check of the results on the user's GPU before the first use in a type and width.

Some kernels silently compute wrong results on some GPUs with some versions of Triton (flash-linear-attention's issue 640,
and two faults of our own in LOG.md). `make test-gpu` checks our own kernels. Other projects' kernels first compute a small
case, once per process: outputs and all gradients are compared with the reference in float64. The log has the result.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache

import torch
from torch import Tensor

from students.kernels.launch import precision

# Largest relative error of outputs and gradients, ||found - wanted|| / ||wanted||
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-4}
TF32 = 4e-3  # tolerance of float32 if PyTorch's setting allows products in tf32

_log = logging.getLogger(__name__)


def refusal(name: str, kernel: Callable, reference: Callable, draw: Callable, case: tuple, example: Tensor) -> str | None:
    """Returns why a kernel may not serve a tensor like `example` on its GPU; None if it passed its trial on `draw(case)`."""
    if not example.is_cuda:
        return None
    return _verdict(name, kernel, reference, draw, case, example.dtype, precision(example.dtype), example.device)


@cache
def _verdict(name, kernel, reference, draw, case, dtype, products, device) -> str | None:
    kind = str(dtype).removeprefix("torch.")
    where = f"in {kind} on {torch.cuda.get_device_name(device)}"
    try:
        errors = disagreement(kernel, reference, draw, case, dtype, device)
    except Exception as error:  # of any kind, from a compiler or the kernel's own checks: it cannot be used
        return f"{name} fails its check {where}: {type(error).__name__}: {error}"
    worst = max(errors, key=lambda name: errors[name])
    allowed = TF32 if dtype == torch.float32 and products == "tf32" else TOLERANCE[dtype]
    if errors[worst] > allowed:
        return f"{name} is wrong {where}: the error of its {worst} is {errors[worst]:.2%}; {allowed:.2%} is allowed"
    _log.info("%s agrees with the reference %s; largest relative error: %.2g (%s)", name, where, errors[worst], worst)
    return None


def disagreement(
    function: Callable, reference: Callable, draw: Callable, case: tuple, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Returns the relative errors of a function's outputs and gradients against a float64 reference on the same inputs."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        torch.manual_seed(0)
        leaves, fixed = draw(case, dtype, str(device))
        found = _outputs_and_gradients(function, leaves, fixed)
        wanted = _outputs_and_gradients(reference, {name: leaf.double() for name, leaf in leaves.items()}, fixed)
    errors = {name: (found[name].double() - part).norm() / part.norm() for name, part in wanted.items()}
    return {name: error.nan_to_num(torch.inf).item() for name, error in errors.items()}


def _outputs_and_gradients(function, leaves, fixed) -> dict[str, Tensor]:
    torch.manual_seed(1)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    outputs = dict(zip(("output", "final state"), function(**leaves, **fixed), strict=True))
    wide = torch.promote_types(torch.float32, next(iter(leaves.values())).dtype)
    directions = [torch.randn(part.shape, device=part.device) for part in outputs.values()]
    loss = sum((part.to(wide) * direction).sum() for part, direction in zip(outputs.values(), directions, strict=True))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    outputs = {name: part.detach() for name, part in outputs.items()}
    return outputs | {f"gradient of {name}": part for name, part in zip(leaves, gradients, strict=True)}
