"""Descriptions of the ops with Triton kernels for tests and benchmarks: cases, inputs, implementations, least work.

Each op is described in the table OPS of its folder's cases.py, and `all_ops` joins these tables. Students do not use them.
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
    """The least work of any kernel: (bytes, FLOP) of the forward pass and of both passes, with inputs in 2-byte types.

    Each input is read once, each output is written once, nothing is recomputed, and the masked half of a causal square is
    left out.
    """

    forward: tuple[float, float]
    both: tuple[float, float]


def short(case: Any) -> Any:
    """Returns the case with one sequence of at most 1,000 tokens."""
    return case._replace(b=1, t=min(case.t, 1000))


class Op(NamedTuple):
    """One op: cases, inputs, reference, kernel (`target`, "module:function"), work, and how it is called."""

    cases: list
    draw_all: Callable
    reference: Callable
    target: str
    work: Callable[..., Work]
    small: Callable = short  # case -> smaller case whose float64 reference is fast
    choices: Callable | None = None  # (the kernel's module, case, type) -> shipped configurations, the default first
    without: tuple[str, ...] = ()  # inputs that a benchmark leaves out: initial states
    call: Callable | None = None
    force_as: str = "config"
    backward: bool = True
    place: int = 100  # order in tables; ops with equal places are sorted by the folder's name

    def module(self) -> ModuleType:
        """Import the module of the Triton implementation, and Triton with it."""
        return import_module(self.target.partition(":")[0])

    def kernel(self) -> Callable:
        """Returns the Triton implementation."""
        return getattr(self.module(), self.target.partition(":")[2])

    def configs(self, case: Any, dtype: torch.dtype) -> list:
        """Returns the shipped configurations for a case, the default first; [None] if the kernel has no choices."""
        return [None] if self.choices is None else list(self.choices(self.module(), case, dtype))

    def draw(self, case: Any, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
        """Draw the inputs of a case: those with gradients, and the others."""
        leaves, fixed = self.draw_all(case, dtype, device)
        return {k: v for k, v in leaves.items() if k not in self.without}, fixed | dict.fromkeys(self.without)

    def adapted(self, function: Callable) -> Callable:
        """Returns `function` in a form that takes the inputs that `draw` returns."""
        call = self.call
        return function if call is None else lambda **inputs: call(function, **inputs)

    def force(self, config: Any) -> dict:
        """Returns the keyword argument that selects a configuration of the kernel."""
        return {} if config is None else {self.force_as: config}


class _Place(NamedTuple):
    """A placeholder for a tensor in an argument of `flat`."""

    name: str


def flat(arguments: dict) -> dict:
    """Split arguments with nested tuples and lists into tensors by name and the structure `around` them, for `called`."""
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
    """Call a function on arguments that `flat` split; a list of outputs becomes a tuple."""

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
    """Returns `function` with some keyword arguments fixed."""
    return lambda *arguments, **inputs: function(*arguments, **inputs, **options)


def folders() -> list[str]:
    """Returns the names of the ops' folders in alphabetical order."""
    return sorted(entry.name for entry in pkgutil.iter_modules(kernels.__path__) if entry.ispkg)


def all_ops() -> dict[str, Op]:
    """Returns the ops of every folder in one table, sorted by their places."""
    tables = [import_module(f"{kernels.__name__}.{folder}.cases") for folder in folders()]
    ops = [entry for table in tables for entry in getattr(table, "OPS", {}).items()]
    return dict(sorted(ops, key=lambda entry: entry[1].place))
