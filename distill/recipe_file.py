"""Loading of recipes: a file or a shipped recipe is found, read, changed by overrides (`key.sub=value`) and checked.

An unknown key, a wrong type or an impossible combination is an error that names the key, the file and the nearest valid
key. Overrides are applied before the checks. Entries of lists are addressed by index (`stages.1.lr=1e-3`) or by name
(`stages.align.lr=1e-3`).
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.exporters import check_targets
from distill.recipe import Recipe, parse
from distill.selection.checking import check_selection
from distill.shipped import find
from distill.stages import check_stages
from distill.starting import fill_layout
from distill.yaml_file import override, read

AnyRecipe = str | Path | Mapping[str, Any] | Recipe  # a file, a shipped recipe's name, or a recipe's entries


def load(
    reference: AnyRecipe,
    overrides: str | Sequence[str] = (),
    change: Callable[[dict, str], None] | None = None,
) -> Recipe:
    """Read, override and check a recipe.

    Args:
        reference: a file, the name of a shipped recipe, a mapping with a recipe's entries, or a loaded recipe. overrides:
            one or several. change: a function of the entries and the file's name that changes the entries before the
            overrides.

    Raises:
        UserError: no such recipe, YAML that does not parse, or anything that the schema or a table refuses.
    """
    if isinstance(reference, Recipe) and not overrides and change is None:
        return _checked(reference, reference.name)
    if isinstance(reference, Recipe):
        entries, where = reference.model_dump(mode="json", exclude_unset=True), reference.name
    elif isinstance(reference, Mapping):
        entries, where = copy.deepcopy(dict(reference)), str(reference.get("name", "recipe"))
    else:
        path = find(reference)
        entries, where = read(path), str(path)
        entries.setdefault("name", path.stem)
    if isinstance(entries.get("stages"), list):  # `- align:` alone asks for the defaults
        entries["stages"] = [
            {name: options or {} for name, options in stage.items()} if isinstance(stage, dict) else stage
            for stage in entries["stages"]
        ]
    if change is not None:
        if entries.get("student") is not None:
            raise UserError(
                f"{where}: the student {entries['student']} already has a layout; leave out student to select one"
            )
        change(entries, where)
    for text in [overrides] if isinstance(overrides, str) else overrides:
        override(entries, text)
    fill_layout(entries, where)
    return check(entries, where)


def check(entries: dict, where: str) -> Recipe:
    """Validate a recipe's entries: by the schema, then by the tables of stages, scorers and export targets.

    Raises:
        UserError: with every error, each naming its key.
    """
    return _checked(parse(entries, where), where)


def check_run(path: str | PathLike) -> None:
    """Refuse a run folder whose recipe is no longer valid. A path that is not a run folder is not checked.

    Raises:
        UserError: naming the file and the key.
    """
    for name in ("recipe.yaml", "resolved.yaml"):
        file = Path(path) / name
        if os.path.isfile(file):
            check(read(file), str(file))


def _checked(recipe: Recipe, where: str) -> Recipe:
    """Check a recipe by the tables of export targets, stages and scorers, and return it."""
    check_targets(recipe, where)
    check_stages(recipe, where)
    check_selection(recipe, where)
    return recipe
