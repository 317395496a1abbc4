"""The operations students run on, one folder each, and the one switch between their implementations.

A folder holds `__init__.py` (checks and dispatch), `reference.py` (plain PyTorch: obvious, differentiable, runs
anywhere), `cases.py` (the shapes that tests and benchmarks use) and, where one is written, `kernel.py` (Triton).
Nothing here knows a model or a library of models.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

BACKENDS = ("auto", "reference", "triton")

_chosen: ContextVar[str] = ContextVar("kernel_backend", default="auto")
_logged: set[tuple[str, str, str]] = set()
_log = logging.getLogger(__name__)


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


def pick(op: str, implementations: Mapping[str, Callable], example: Tensor) -> Callable:
    """The implementation of `op` for a tensor like `example`; the log names each choice once.

    Raises:
        ValueError: the back end was asked for by name and `op` has none of that name.
    """
    name = _chosen.get()
    if name == "auto":
        name = "triton" if example.is_cuda and "triton" in implementations else "reference"
    if name not in implementations:
        raise ValueError(f"{op} has no {name} implementation; it has {', '.join(implementations)}")
    choice = (op, name, example.device.type)
    if choice not in _logged:
        _logged.add(choice)
        _log.info("%s runs on its %s implementation (%s)", *choice)
    return implementations[name]
