"""The Python API of text: as `api.py`, one function a verb."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from distill.recipe import Recipe


def prepare(
    recipe: "str | Path | Mapping[str, Any] | Recipe",
    *,
    overrides: str | Sequence[str] = (),
    processes: int | None = None,
    console: "Console | None" = None,
) -> dict[str, Any]:
    """Prepare the texts of a recipe: tokenise them in shards, so that runs find them. A call that was stopped goes on.

    Args:
        recipe, overrides: as in `plan`. processes: that tokenise; by the cores and the size of each text by default. The
            result is the same with any number. console: where progress is shown (the standard error).

    Returns:
        what the docstring of `distill.runs.preparing.prepare_texts` says.

    Raises:
        UserError: anything that the user can mend.
    """
    from distill.console import new_console
    from distill.ranges import PREPARING
    from distill.recipe_file import load
    from distill.runs.preparing import prepare_texts

    if processes is not None:
        PREPARING.check(processes, "processes")
    return prepare_texts(load(recipe, overrides), processes, console or new_console(stderr=True))
