"""The operations students run on, one folder each, and the one switch between their implementations.

A folder holds `__init__.py` (checks and dispatch), `reference.py` (plain PyTorch: obvious, differentiable, runs
anywhere), `cases.py` (the shapes that tests use, and what a benchmark must know) and, where one is written, `kernel.py`
(Triton). No list names the folders: `op.py` goes through them. Nothing here knows a model or a library of models.

`backend("reference")` or the environment's DISTILL_KERNELS=reference forces one implementation. Where Triton's is forced
and cannot serve a call, the call fails; where nothing is forced the log says why the reference serves it.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "triton")
TYPES = (torch.float16, torch.bfloat16, torch.float32)  # that the Triton kernels compute in

_on_paper: ContextVar[bool] = ContextVar("kernels_on_paper", default=False)
_chosen: ContextVar[str | None] = ContextVar("kernel_backend", default=None)
_logged: set[tuple[str, str, str]] = set()
_log = logging.getLogger(__name__)

Implementations = Mapping[str, Callable[..., Any]]  # of one op, by the name of their back end


class BackendError(ValueError):
    """A back end that was asked for by name cannot be had."""


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the block on one back end: "auto" (Triton on a GPU where the op has it), "reference" or "triton".

    Raises:
        ValueError: the name is none of these.
    """
    if name not in BACKENDS:
        raise ValueError(f"kernel back end {name!r} does not exist; choose one of {', '.join(BACKENDS)}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> str:
    """The back end that is asked for: one of BACKENDS, unless the environment says something else."""
    return _chosen.get() or os.environ.get("DISTILL_KERNELS", "auto")


@contextmanager
def on_paper() -> Iterator[None]:
    """Inside the block ops run as on a GPU, for tensors of shapes without values (`FakeTensorMode`, on a CPU): Triton's
    implementations are chosen, they take their memory, and nothing is launched. Where Triton is not installed the
    references run."""
    token, launching = _on_paper.set(True), None
    if _is_installed("triton", None):
        interface = import_module("triton.runtime.jit").KernelInterface  # seen in Triton 3.4 to 3.9
        launching = interface, interface.__getitem__
        interface.__getitem__ = lambda kernel, grid: lambda *arguments, **options: None
    try:
        yield
    finally:
        _on_paper.reset(token)
        if launching:
            launching[0].__getitem__ = launching[1]


def is_on_paper() -> bool:
    """Whether the tensors of this moment have no values; see `on_paper`."""
    return _on_paper.get()


class Deferred:
    """A function of a module that is imported at its first call: Triton is not loaded, or needed, before."""

    def __init__(self, module: str, name: str, package: str | None = None) -> None:
        self.module, self.name, self.package = module, name, package  # a package where the module is named relatively

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return getattr(import_module(self.module, self.package), self.name)(*arguments, **options)

    def missing(self) -> str | None:
        """The first of what it needs that is not installed."""
        return next((name for name in ("triton", self.module) if not _is_installed(name, self.package)), None)


def compute_type(example: Tensor) -> torch.dtype:
    """The type that an op which heeds autocast computes in."""
    kind = example.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else example.dtype


def pick(
    op: str,
    implementations: Implementations,
    example: Tensor,
    refusal: str | Callable[[], str | None] | None = None,
    computes: torch.dtype | None = None,
    checked: Collection[torch.dtype] = TYPES,
) -> Callable:
    """The implementation of `op` for a tensor like `example`; the log names each choice once.

    `refusal` says why the Triton kernel cannot serve this call, None where it can; where finding out costs something it is a
    function, called when nothing else speaks against the kernel. `computes` is the type it would compute
    in, where that is not the example's. `checked` are the types in which the kernel was compared with float64 on a GPU
    (LOG.md): others run on the reference unless Triton is asked for by name. Other people's kernels are compared where they
    run (`kernels.trial`).

    Raises:
        BackendError: a back end was asked for by name and does not exist, or cannot serve this call.
    """
    name, gpu = chosen(), example.is_cuda or is_on_paper()
    if name not in BACKENDS:
        raise BackendError(f"DISTILL_KERNELS={name!r} does not exist; choose one of {', '.join(BACKENDS)}")
    reason = None
    if name != "reference":
        reason = _why_not_triton(implementations, example) or (refusal() if callable(refusal) else refusal)
    if name == "auto":
        kind = computes or example.dtype
        if reason is None and kind not in checked:
            said = str(kind).removeprefix("torch.")
            reason = f"its kernel has not been checked in {said} on a GPU; DISTILL_KERNELS=triton runs it"
        name = "triton" if reason is None and gpu else "reference"
    elif reason is not None:
        raise BackendError(
            f"{op} cannot run on its triton implementation: {reason}; DISTILL_KERNELS=auto takes what is there"
        )
    choice = (op, name, str(example.device.type) + (f": {reason}" if reason and example.is_cuda else ""))
    if choice not in _logged and not is_on_paper():
        _logged.add(choice)
        _log.info("%s runs on its %s implementation (%s)", *choice)
    return implementations[name]


def _why_not_triton(implementations: Implementations, example: Tensor) -> str | None:
    kernel = cast(Deferred | None, implementations.get("triton"))
    if kernel is None:
        return f"there is no triton implementation; there is {', '.join(implementations)}"
    if example.dtype not in TYPES:
        return f"it computes in float16, bfloat16 or float32, not {str(example.dtype).removeprefix('torch.')}"
    if kernel.missing() is not None:
        return f"{kernel.missing()} is not installed"
    if not (example.is_cuda or is_on_paper()) and os.environ.get("TRITON_INTERPRET") != "1":
        return "without a GPU it needs TRITON_INTERPRET=1 in the environment before Python starts"
    return None


@cache
def _is_installed(module: str, package: str | None) -> bool:
    try:
        return importlib.util.find_spec(module, package) is not None
    except ModuleNotFoundError:  # nor is the package it would be in
        return False
