"""Kernels of flash-linear-attention (fla-core, the extra `fla`); they run only if they pass a trial (`kernels.trial`)."""

from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata

import torch
from torch import Tensor

from students.kernels import Deferred
from students.kernels.documents import runs
from students.kernels.trial import refusal as trial
from students.shapes import Float, Int


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
    """Call a kernel of fla-core in its layout: no scale, states as [b h n p], documents as sequences of one long row."""
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
    """Returns the bounds of the runs of equal ids in the flattened batch, and the first and last run of each row."""
    ids = runs(documents)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    numbers = starts.flatten().cumsum(0).view_as(ids) - 1
    bounds = starts.flatten().nonzero().squeeze(1)
    return torch.cat([bounds, bounds.new_tensor([ids.numel()])]), numbers[:, 0], numbers[:, -1]


def refusal(op: str, reference: Callable, draw: Callable, case: tuple, example: Tensor) -> str | None:
    """Returns why fla's kernel may not serve a tensor like `example`; None if it passed its trial on `draw(case)`."""
    if not example.is_cuda:
        return "fla-core's kernels need a GPU"
    return trial(f"fla-core {_version()}'s {op}", globals()[op], reference, draw, case, example)


@cache
def _version() -> str | None:
    try:
        return metadata.version("fla-core")
    except metadata.PackageNotFoundError:
        return None
