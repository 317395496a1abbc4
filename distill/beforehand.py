"""The Python API of what is made before a run, which then reads it: as `api`, one function a verb, imports inside."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from distill.recipe import Recipe


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
