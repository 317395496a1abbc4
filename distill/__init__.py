"""Turn pretrained Transformers into state-space hybrids by distillation.

The Python API is the command line's: `distill.run(recipe)`, `distill.select(recipe)`, `distill.evaluate(run)`,
`distill.report(run)`, `distill.export(run, out=folder)`.
"""

from importlib import import_module

__version__ = "0.1.0"

CALLABLE = ("evaluate", "export", "report", "select")  # packages that are called like the verbs they are named for


def run(recipe, *, overrides=(), fresh=False, runs="runs", stop_after=None):
    """Run a recipe (a path or a shipped recipe's name) to its end, or go on where it stopped; see `distill.runner.run`."""
    from distill.recipe import load
    from distill.runner import run as run_recipe

    return run_recipe(load(recipe, overrides), runs=runs, fresh=fresh, stop_after=stop_after)


def __getattr__(name: str):
    if name in CALLABLE:
        return import_module(f"distill.{name}")
    raise AttributeError(f"module 'distill' has no attribute {name!r}")
