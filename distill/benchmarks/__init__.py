"""`distill bench`: benchmarks of this machine, one module a mode.

Each module has `run(...) -> dict`, `table(result)` for printing, and `all_right(result)`, which is False where something
failed. The arguments of `run` are the mode's options, and RECIPE is its default recipe. A mode whose `run` takes `recipes`
gets several, each with the name of its rows.

ops.py      kernels next to references and peers, with measure.py (ceilings and times), check.py (errors against float64) and
            peers.py (other projects' kernels)
steps.py    whole optimizer steps of a recipe
layouts.py  every layout trained on one recipe's budget
generation.py  first tokens, decoding and caches of a recipe's teacher and students with random weights, with sizes.py
            (bytes), protocols.py (how papers measured) and comparison.py (against the teacher)
"""

import inspect
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from distill.benchmarks.comparison import TEACHER
from distill.errors import UserError, nearest
from distill.recipe import Recipe
from distill.recipe_file import load

BENCHMARKS = {
    "ops": "distill.benchmarks.ops",
    "steps": "distill.benchmarks.steps",
    "layouts": "distill.benchmarks.layouts",
    "generation": "distill.benchmarks.generation",
}


def benchmark(mode: str) -> ModuleType:
    """The module of a mode.

    Raises:
        UserError: there is no such mode.
    """
    if mode not in BENCHMARKS:
        raise UserError(f"there is no benchmark {mode!r}; {nearest(mode, BENCHMARKS)}")
    return import_module(BENCHMARKS[mode])


def run_benchmark(mode: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Run a mode with its options, and return what it measured.

    Args:
        asked: every option of every mode by name, None where it was not given. `recipe`, `overrides` and `variants` are
            loaded here, see `named_recipes`.

    Raises:
        UserError: there is no such mode, or an option is another mode's.
    """
    chosen = benchmark(mode)
    known = set(inspect.signature(chosen.run).parameters)
    known |= {"overrides"} if "recipe" in known else set()
    known |= {"recipe", "overrides", "variants"} if "recipes" in known else set()
    given = {name: value for name, value in asked.items() if value is not None}
    if foreign := [name for name in given if name not in known]:
        takes = ", ".join(name for name in asked if name in known)
        raise UserError(f"bench {mode} has no option {foreign[0]!r}; it takes {takes}")
    if "recipes" in known:
        loading = given.pop("recipe", chosen.RECIPE), given.pop("overrides", ()), given.pop("variants", ())
        given["recipes"] = named_recipes(*loading)
    elif "recipe" in known:
        given["recipe"] = load(one_recipe(mode, given.get("recipe", chosen.RECIPE)), given.pop("overrides", ()))
    return chosen.run(**given)


def one_recipe(mode: str, recipe: Any) -> Any:
    """The recipe of a mode that takes only one.

    Raises:
        UserError: several were given.
    """
    if not isinstance(recipe, list | tuple):
        return recipe
    if len(recipe) != 1:
        raise UserError(f"bench {mode} takes one recipe, not {len(recipe)}; bench generation takes several")
    return recipe[0]


def named_recipes(recipes: Any, overrides: str | Sequence[str], variants: str | Sequence[str]) -> list[tuple[str, Recipe]]:
    """Recipes, each followed by its variants, with the names of their rows.

    Args:
        recipes: one or several. overrides: for all recipes. variants: further overrides, `key=value; key=value`; each
            variant adds one student. A name may come first, as in `windows: mixers.M.window.size=64`; without one, the
            overrides are the name.

    Raises:
        UserError: see `load`; also where two rows of a recipe, its teacher's included, have the same name.
    """
    own = [overrides] if isinstance(overrides, str) else list(overrides)
    students = [(text, *_variant(text)) for text in ([variants] if isinstance(variants, str) else variants)]
    found: list[tuple[str, Recipe]] = []
    for reference in recipes if isinstance(recipes, list | tuple) else [recipes]:
        recipe = load(reference, own)
        names = [TEACHER, recipe.name, *(name for _, name, _ in students)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"two rows would be called {twice!r}; give each --variant a name of its own: 'NAME: key=value'")
        found.append((recipe.name, recipe))
        for text, name, changes in students:
            try:
                found.append((name, load(reference, [*own, *changes])))
            except UserError as error:
                raise UserError(f"--variant {text!r}: {error}") from error
    return found


def _variant(text: str) -> tuple[str, list[str]]:
    """A variant's name and overrides.

    Raises:
        UserError: the name or the overrides are missing.
    """
    name, colon, rest = text.partition(":")
    named = bool(colon) and "=" not in name
    changes = [part.strip() for part in (rest if named else text).split(";") if part.strip()]
    name = name.strip() if named else text.strip()
    if not name or not changes:
        raise UserError(f"--variant {text!r} should read 'NAME: key=value; key=value'")
    return name, changes
