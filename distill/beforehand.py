"""The Python API of what stands before a run: recipes, prepared text, cached logits. Imports stand inside the functions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from distill.recipe import Recipe


def recipes() -> list[dict[str, str]]:
    """The shipped recipes: name, teacher, and what the first comment says."""
    from distill.shipped import list_recipes

    return list_recipes()


def recipe_text(name: str) -> str:
    """A shipped recipe as it is written; a UserError says that there is none."""
    from distill.shipped import find_shipped

    return find_shipped(name).read_text(encoding="utf-8")


def copy_recipe(name: str, target: str | Path = ".") -> Path:
    """Copy a shipped recipe to a file or into a folder, to change it; the new file's path. A UserError says why not."""
    from distill.shipped import copy_shipped

    return copy_shipped(name, Path(target))


def prepare(
    recipe: "str | Path | Mapping[str, Any] | Recipe",
    *,
    overrides: str | Sequence[str] = (),
    processes: int | None = None,
    console: "Console | None" = None,
    show: int = 0,
) -> dict[str, Any]:
    """Prepare the texts of a recipe: tokenise them in shards, so that runs find them. A call that was stopped goes on.

    Args:
        recipe, overrides: as in `plan`. processes: that tokenise; by the cores and the size of each text by default. The
            result is the same with any number. console: where progress is shown (the standard error). show: so many
            documents of each text are in the result token by token, with what is trained on.

    Returns:
        what the docstring of `distill.runs.preparing.prepare_texts` says.

    Raises:
        UserError: anything that the user can mend.
    """
    from distill.console import new_console
    from distill.ranges import PREPARING, SHOWN
    from distill.recipe_file import load
    from distill.runs.preparing import prepare_texts

    if processes is not None:
        PREPARING.check(processes, "processes")
    SHOWN.check(show, "show")
    return prepare_texts(load(recipe, overrides), processes, console or new_console(stderr=True), show)


def cache(
    recipe: "str | Path | Mapping[str, Any] | Recipe",
    *,
    overrides: str | Sequence[str] = (),
    out: str | Path | None = None,
    top_k: int = 128,
    stage: str | int | None = None,
    stop_after: float | None = None,
    console: "Console | None" = None,
) -> Path:
    """Write a teacher's likeliest tokens of the windows that a recipe's imitate stage reads, for `imitate.offline_logits`.

    Windows that are there already stay: a call that was stopped goes on, and a longer recipe adds what it needs.

    Args:
        recipe, overrides: as in `plan`. out: the folder; by default the stage's own offline_logits, else one in the cache
            named by what it holds. top_k: tokens that are kept of each distribution. stage: the number of one of several
            such stages. stop_after: minutes after which to stop. console: where progress is shown (the standard error).

    Returns:
        the folder.

    Raises:
        UserError: anything that the user can mend. Interrupted: stopped early, every whole shard kept.
    """
    from distill.caching import write_cache
    from distill.ranges import TOP_K
    from distill.recipe_file import load
    from distill.runs.stopper import Stopper, deadline

    top_k, stopper = TOP_K.check(top_k, "--top-k"), Stopper(deadline(stop_after))
    stage = None if stage is None else str(stage)
    return write_cache(load(recipe, overrides), out=out, top_k=top_k, stage=stage, stopper=stopper, console=console)
