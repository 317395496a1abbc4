"""`distill bench`: what is timed on this machine, one module a mode.

Each has `run(...) -> dict`, `table(result)` to print it, and `all_right(result)`, which is False where something failed; the
arguments of `run` are its options, and RECIPE is the recipe that it takes where none is named.

ops.py      kernels beside references and peers, by measure.py (ceilings and times), check.py (errors against float64) and
            peers.py (other people's kernels)
steps.py    whole optimizer steps of a recipe
layouts.py  every layout trained on one recipe's budget
"""

from importlib import import_module
from types import ModuleType

from distill.errors import UserError, nearest

BENCHMARKS = {
    "ops": "distill.benchmarks.ops",
    "steps": "distill.benchmarks.steps",
    "layouts": "distill.benchmarks.layouts",
}


def benchmark(mode: str) -> ModuleType:
    """The module behind a name of the table.

    Raises:
        UserError: a mode that is not in the table.
    """
    if mode not in BENCHMARKS:
        raise UserError(f"there is no benchmark {mode!r}; {nearest(mode, BENCHMARKS)}")
    return import_module(BENCHMARKS[mode])
