"""flash-linear-attention's Triton kernels (fla-core, the extra `fla`): run only where they pass a check.

On some GPUs, with some versions of Triton, some of their gradients are wrong without a word (fla issue 640). So before a
kernel first runs on a GPU, in a type and at the widths of the call, its outputs and every gradient are compared with the
reference in float64, once a process. The log says what came of it.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from importlib import import_module, metadata

import torch
from torch import Tensor

from students.kernels import Deferred
from students.kernels.documents import runs
from students.kernels.launch import precision
from students.shapes import Float, Int

# ||found - wanted|| / ||wanted|| that outputs and gradients must stay under
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-4}
TF32 = 4e-3  # of float32 where PyTorch's own products may run in tf32

_log = logging.getLogger(__name__)


class Kernel(Deferred):
    """A function of this module, for an op's table of implementations."""

    def __init__(self, name: str) -> None:
        super().__init__(__name__, name)

    def missing(self) -> str | None:
        return super().missing() or (None if _version() else "fla-core (pip install 'distill-hybrids[fla]')")


def gated_delta_rule(
    q: Float[Tensor, "b t g n"],
    k: Float[Tensor, "b t g n"],
    v: Float[Tensor, "b t h p"],
    log_a: Float[Tensor, "b t h"],
    beta: Float[Tensor, "b t h"],
    documents: Int[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """See `students.kernels.gated_delta_rule.gated_delta_rule`."""
    run = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    parts = {"q": q.to(v.dtype), "k": k.to(v.dtype), "v": v, "g": log_a.float(), "beta": beta.to(v.dtype)}
    return _run(run, parts, documents, initial_state)


def gla(
    q: Float[Tensor, "b t h n"],
    k: Float[Tensor, "b t h n"],
    v: Float[Tensor, "b t h p"],
    log_a: Float[Tensor, "b t h n"],
    documents: Int[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """See `students.kernels.gla.gla`."""
    run = import_module("fla.ops.gla").chunk_gla
    parts = {"q": q.to(v.dtype), "k": k.to(v.dtype), "v": v, "g": log_a.float()}
    return _run(run, parts, documents, initial_state)


def _run(
    function: Callable, parts: dict[str, Tensor], documents: Int[Tensor, "b t"] | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Call one of theirs: no scale, states as [b h n p], documents as sequences of one long row."""
    v, keys = parts["v"], parts["k"].shape[3]
    if state is None:
        state = v.new_zeros(v.shape[0], *v.shape[2:], keys, dtype=torch.float32)
    state, options = state.float().transpose(2, 3).contiguous(), {"scale": 1.0, "output_final_state": True}
    with torch.autocast(v.device.type, enabled=False):
        if documents is None:
            y, final = function(**parts, initial_state=state, **options)
            return y, final.transpose(2, 3)
        bounds, first, last = _sequences(documents)
        states = state.new_zeros(len(bounds) - 1, *state.shape[1:]).index_copy(0, first, state)
        rows = {name: part.flatten(0, 1)[None] for name, part in parts.items()}
        y, final = function(**rows, initial_state=states, cu_seqlens=bounds, **options)
    return y.squeeze(0).unflatten(0, v.shape[:2]), final[last].transpose(2, 3)


def _sequences(documents: Int[Tensor, "b t"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " b"], Int[Tensor, " b"]]:
    """Where each run of equal ids begins in the flattened batch (and the end), and the first and last run of each row."""
    ids = runs(documents)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    numbers = starts.flatten().cumsum(0).view_as(ids) - 1
    bounds = starts.flatten().nonzero().squeeze(1)
    return torch.cat([bounds, bounds.new_tensor([ids.numel()])]), numbers[:, 0], numbers[:, -1]


def refusal(op: str, reference: Callable, draw: Callable, case: tuple, example: Tensor) -> str | None:
    """Why fla's kernel may not serve a tensor like `example`; None where it passed the check on `draw(case)`."""
    if not example.is_cuda:
        return "fla-core's kernels need a GPU"
    return _verdict(op, reference, draw, case, example.dtype, precision(example.dtype), example.device)


@cache
def _version() -> str | None:
    try:
        return metadata.version("fla-core")
    except metadata.PackageNotFoundError:
        return None


@cache
def _verdict(op, reference, draw, case, dtype, products, device) -> str | None:
    name, kind = f"fla-core {_version()}'s {op}", str(dtype).removeprefix("torch.")
    where = f"in {kind} on {torch.cuda.get_device_name(device)}"
    try:
        errors = disagreement(globals()[op], reference, draw, case, dtype, device)
    except Exception as error:  # a compiler's or a guard of theirs: whatever it is, the kernel cannot be used
        return f"{name} fails its check {where}: {type(error).__name__}: {error}"
    worst = max(errors, key=errors.get)
    allowed = TF32 if dtype == torch.float32 and products == "tf32" else TOLERANCE[dtype]
    if errors[worst] > allowed:
        return f"{name} is wrong {where}: its {worst} is off by {errors[worst]:.2%}, where {allowed:.2%} is allowed"
    _log.info("%s agrees with the reference %s, its %s to %.2g", name, where, worst, errors[worst])
    return None


def disagreement(
    function: Callable, reference: Callable, draw: Callable, case: tuple, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Relative errors of a function's outputs and gradients against a reference in float64, on the same inputs."""
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
