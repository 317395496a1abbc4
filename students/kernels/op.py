"""What an op with a Triton kernel tells tests and benchmarks: its cases and inputs, its implementations, its least work.

Each describes itself in the table OPS of its folder's cases.py, and `all_ops` joins these tables. Students do without both.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from students import kernels


class Work(NamedTuple):
    """(bytes, FLOP) of the forward pass and of both passes, inputs in 2-byte types.

    They are those that any kernel must spend: each input read once, each output written once, nothing recomputed, the
    masked half of a square left out.
    """

    forward: tuple[float, float]
    both: tuple[float, float]


def short(case: Any) -> Any:
    """The case with one sequence of at most 1,000 tokens."""
    return case._replace(b=1, t=min(case.t, 1000))


class Op(NamedTuple):
    """One op: its cases and inputs, reference and kernel ("module:function"), its work, what is special about calling it."""

    cases: list
    draw_all: Callable
    reference: Callable
    target: str
    work: Callable[..., Work]
    small: Callable = short  # a case -> one whose float64 reference is quick
    choices: Callable | None = None  # (the kernel's module, case, type) -> shipped configurations, the default first
    without: tuple[str, ...] = ()  # inputs that a benchmark leaves out: states carried from elsewhere
    call: Callable | None = None
    force_as: str = "config"
    backward: bool = True
    place: int = 100  # in tables; where places are equal, by the folder's name

    def module(self) -> ModuleType:
        """Where the Triton implementation is; Triton is imported with it."""
        return import_module(self.target.partition(":")[0])

    def kernel(self) -> Callable:
        """The Triton implementation."""
        return getattr(self.module(), self.target.partition(":")[2])

    def configs(self, case: Any, dtype: torch.dtype) -> list:
        """The shipped configurations for a case, the default first; [None] where there is nothing to choose."""
        return [None] if self.choices is None else list(self.choices(self.module(), case, dtype))

    def draw(self, case: Any, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
        """Inputs of a case: those with gradients, and the others."""
        leaves, fixed = self.draw_all(case, dtype, device)
        return {k: v for k, v in leaves.items() if k not in self.without}, fixed | dict.fromkeys(self.without)

    def adapted(self, function: Callable) -> Callable:
        """`function` as a call on what `draw` returns."""
        call = self.call
        return function if call is None else lambda **inputs: call(function, **inputs)

    def force(self, config: Any) -> dict:
        """The keyword that makes the kernel use a configuration."""
        return {} if config is None else {self.force_as: config}


class _Place(NamedTuple):
    """Where a tensor stood in a `flat` argument."""

    name: str


def flat(arguments: dict) -> dict:
    """Arguments whose tensors stand in tuples and lists, as tensors by name and what is around them: for `called`."""
    parts: dict[str, Tensor] = {}

    def put(name: str, value):
        if isinstance(value, Tensor):
            parts[name] = value
            return _Place(name)
        if isinstance(value, tuple | list):
            return type(value), [put(f"{name}.{index}", part) for index, part in enumerate(value)]
        return value

    around = {name: put(name, value) for name, value in arguments.items()}
    return parts | {"around": around}


def called(function: Callable, *, around: dict, **parts: Tensor) -> Any:
    """A function of what `flat` made flat; a list of outputs as a tuple."""

    def get(value):
        if isinstance(value, _Place):
            return parts[value.name]
        if isinstance(value, tuple):
            kind, inside = value[0], [get(part) for part in value[1]]
            return kind(*inside) if hasattr(kind, "_fields") else kind(inside)
        return value

    outputs = function(**{name: get(value) for name, value in around.items()})
    return tuple(outputs) if isinstance(outputs, list) else outputs


def forced(function: Callable, **options: Any) -> Callable:
    """`function` with some keywords fixed."""
    return lambda *arguments, **inputs: function(*arguments, **inputs, **options)


def folders() -> list[str]:
    """The names of the ops' folders, alphabetically."""
    return sorted(entry.name for entry in pkgutil.iter_modules(kernels.__path__) if entry.ispkg)


def all_ops() -> dict[str, Op]:
    """Every folder's OPS in one table, in the order of their places."""
    tables = [import_module(f"{kernels.__name__}.{folder}.cases") for folder in folders()]
    ops = [entry for table in tables for entry in getattr(table, "OPS", {}).items()]
    return dict(sorted(ops, key=lambda entry: entry[1].place))
