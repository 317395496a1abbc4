"""`distill bench`: what is timed on this machine, one module a mode.

Each has `run(...) -> dict`, `table(result)` to print it, and `all_right(result)`, which is False where something failed; the
arguments of `run` are its options, and RECIPE is the recipe that it takes where none is named.

ops.py      kernels beside references and peers, by measure.py (ceilings and times), check.py (errors against float64) and
            peers.py (other people's kernels)
steps.py    whole optimizer steps of a recipe
layouts.py  every layout trained on one recipe's budget
"""

import inspect
from importlib import import_module
from types import ModuleType
from typing import Any

from distill.errors import UserError, nearest
from distill.recipe_file import load

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


def run_benchmark(mode: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Run a mode with the options that it has; what it measured.

    Args:
        asked: every option of every mode by name, None where it was not asked for. `recipe` and `overrides` are loaded here.

    Raises:
        UserError: no such mode, or an option of another one.
    """
    chosen = benchmark(mode)
    known = set(inspect.signature(chosen.run).parameters)
    known |= {"overrides"} if "recipe" in known else set()
    given = {name: value for name, value in asked.items() if value is not None}
    if foreign := [name for name in given if name not in known]:
        takes = ", ".join(name for name in asked if name in known)
        raise UserError(f"bench {mode} has no option {foreign[0]!r}; it takes {takes}")
    if "recipe" in known:
        given["recipe"] = load(given.get("recipe", chosen.RECIPE), given.pop("overrides", ()))
    return chosen.run(**given)
