"""The operations (ops) of students, one folder each, and the switch between their implementations in PyTorch and Triton.

A folder holds `__init__.py` (checks and dispatch), `reference.py` (plain PyTorch, differentiable, runs anywhere), `cases.py`
(shapes for tests and benchmarks) and, if the op has a Triton kernel, `kernel.py`. `op.py` finds the folders by itself; there
is no list of them. Ops depend on no model and on no library of models.

`backend("reference")` or DISTILL_KERNELS=reference in the environment forces one implementation. If Triton is forced and
cannot serve a call, the call fails. If nothing is forced and the reference serves a call, the log says why.
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
TYPES = (torch.float16, torch.bfloat16, torch.float32)  # types in which the Triton kernels compute

_on_paper: ContextVar[bool] = ContextVar("kernels_on_paper", default=False)
_chosen: ContextVar[str | None] = ContextVar("kernel_backend", default=None)
_logged: set[tuple[str, str, str]] = set()
_log = logging.getLogger(__name__)

Implementations = Mapping[str, Callable[..., Any]]  # the implementations of one op, by the name of their back end


class BackendError(ValueError):
    """A back end that was chosen by name does not exist or cannot serve a call."""


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the block on one back end: "auto" (Triton on a GPU if the op has a kernel), "reference" or "triton".

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
    """Returns the chosen back end: that of `backend`, else DISTILL_KERNELS (not checked here), else "auto"."""
    return _chosen.get() or os.environ.get("DISTILL_KERNELS", "auto")


@contextmanager
def on_paper() -> Iterator[None]:
    """Inside the block, ops run as on a GPU on tensors without values (`FakeTensorMode`, on a CPU), to measure memory.

    The Triton implementations are chosen and allocate their memory, but launch nothing. If Triton is not installed, the
    references run.
    """
    token, launching = _on_paper.set(True), None
    if _is_installed("triton", None):
        interface = import_module("triton.runtime.jit").KernelInterface  # in Triton 3.4 to 3.9
        launching = interface, interface.__getitem__
        interface.__getitem__ = lambda kernel, grid: lambda *arguments, **options: None
    try:
        yield
    finally:
        _on_paper.reset(token)
        if launching:
            launching[0].__getitem__ = launching[1]


def is_on_paper() -> bool:
    """Returns whether the code runs inside `on_paper`, so that tensors have no values."""
    return _on_paper.get()


class Deferred:
    """A function whose module is imported at the first call, so that Triton is neither loaded nor needed before."""

    def __init__(self, module: str, name: str, package: str | None = None) -> None:
        self.module, self.name, self.package = module, name, package  # package: for a relative module name

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return getattr(import_module(self.module, self.package), self.name)(*arguments, **options)

    def missing(self) -> str | None:
        """Returns the first required module that is not installed; None if all are installed."""
        return next((name for name in ("triton", self.module) if not _is_installed(name, self.package)), None)


def compute_type(example: Tensor) -> torch.dtype:
    """Returns the type in which an op computes that follows autocast."""
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
    """Returns the implementation of `op` for a tensor like `example`; the log names each choice once.

    Args:
        refusal: why the Triton kernel cannot serve this call; None if it can. A function if the check is expensive: it is
            called only if there is no other reason against the kernel.
        computes: the type in which the kernel computes, if it is not the example's.
        checked: types in which the kernel was compared with float64 on a GPU (LOG.md). Other types run on the reference
            unless Triton is chosen by name. Kernels of other projects are compared on the user's GPU (`kernels.trial`).

    Raises:
        BackendError: a back end was chosen by name and does not exist, or cannot serve this call.
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
            f"{op} cannot run on its triton implementation: {reason}; DISTILL_KERNELS=auto falls back to the reference"
        )
    choice = (op, name, str(example.device.type) + (f": {reason}" if reason and example.is_cuda else ""))
    if choice not in _logged and not is_on_paper():
        _logged.add(choice)
        _log.info("%s runs on its %s implementation (%s)", *choice)
    return implementations[name]


def _why_not_triton(implementations: Implementations, example: Tensor) -> str | None:
    kernel = cast(Deferred | None, implementations.get("triton"))
    if kernel is None:
        return f"there is no triton implementation, only {', '.join(implementations)}"
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
    except ModuleNotFoundError:  # its package is not installed either
        return False
