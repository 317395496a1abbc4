"""Which layers, or heads, stay attention: SCORERS in options.py is the table of ways to choose.

A recipe says `pattern: {keep: 0.25, by: recall}` in place of letters, and its run selects before it trains; `distill select`
does the same and shows it. To add a scorer: a file beside this one with a subclass of `Scorer`, its `Options`, and a line in
SCORERS.

What every scorer measures is untrained: a layer's attention is replaced by a window of 64 tokens and 4 sinks (or, with
`stand_in: mixer`, by the recipe's own mixer after its initialise stage), so the recall that a selection predicts is where
training starts, not where it ends.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from distill.callable_package import make_callable
from distill.console import new_console
from distill.errors import UserError
from students.config import KEEP

DEFAULT = "recall"  # the scorer where neither recipe nor command names one


def select(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    by: str | None = None,
    keep: int | float | None = None,
    tasks: str | Path | None = None,
    runs: str | Path = "runs",
    fresh: bool = False,
    write: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Choose which layers or heads of a recipe's teacher stay attention; train nothing but gates.

    Args:
        recipe: a file or a shipped recipe's name. Where its pattern is written out, as much is kept as there, in other
            places. by, keep, tasks: as in a recipe's `pattern`. runs: where run folders are; measurements are kept in the
            recipe's own, and a call that was stopped goes on from them. fresh: measure everything again. write: a file for
            the recipe with the chosen layout. console: where progress is shown.

    Returns:
        `chosen` of the folder's selection.json, see `resolve.resolve`, and `folder`.

    Raises:
        UserError: anything the user can mend.
    """
    from distill.memory import enough_memory
    from distill.recipe import load
    from distill.run_dir import RunDir, alone
    from distill.select.options import options_of
    from distill.select.resolve import resolve
    from distill.session import Session
    from distill.trainer import Stopper

    console = console or new_console(stderr=True)
    if write is not None:
        _check_free(Path(write))
    change = partial(_selecting, by=by, keep=keep, tasks=None if tasks is None else str(tasks))
    loaded = load(recipe, overrides, change)
    options = options_of(loaded)
    session = Session.open(loaded, trains=options.by == "gates" or options.stand_in == "mixer")
    main, path = session.accelerator.is_main_process, RunDir.path_of(loaded, Path(runs))
    with alone(path) if main else nullcontext():
        with session.accelerator.main_process_first():
            folder = RunDir.open(loaded, Path(runs), fresh and main)
        with enough_memory("the selection", "pattern.length, pattern.trials or pattern.tokens, or set device=cpu"):
            resolved, chosen = resolve(session, folder, console if main else Console(quiet=True), Stopper())
    if write is not None and main:
        _write(resolved, Path(write), chosen)
    return {**chosen, "folder": str(folder.path)}


def _selecting(entries: dict, where: str, by: str | None, keep: int | float | None, tasks: str | None) -> None:
    """Make a recipe's entries ask for a selection.

    Raises:
        UserError: the recipe's pattern says nothing of how much to keep, and neither did the user.
    """
    pattern = entries.get("pattern")
    scorer = by or (pattern.get("by") if isinstance(pattern, dict) else None) or DEFAULT
    if scorer == "task" and tasks is None and not (isinstance(pattern, dict) and "tasks" in pattern):
        raise UserError("--by task needs a folder of task files: name it with --tasks FOLDER")
    if tasks is not None and scorer != "task":
        raise UserError(f"--tasks goes with --by task, but the scorer is {scorer}")
    if isinstance(pattern, str):
        kept, rest = pattern.count(KEEP), pattern.replace(KEEP, "")
        if not kept and keep is None:
            raise UserError(f"{where}: the pattern {pattern!r} keeps no attention; say with --keep how many layers should")
        pattern = {"keep": kept / len(pattern) if keep is None else keep, "rest": rest} if rest else {"keep": keep}
    given = {"by": by, "keep": keep, "tasks": tasks}
    asked = {name: value for name, value in given.items() if value is not None}
    entries["pattern"] = {"by": DEFAULT, **pattern, **asked} if isinstance(pattern, dict) else pattern


def _check_free(file: Path) -> None:
    if file.exists():
        raise UserError(f"--write is {file}, which exists already; name another file")
    if not file.parent.is_dir():
        raise UserError(f"--write is {file}, but there is no folder {file.parent}; make it, or name another file")


def _write(recipe, file: Path, chosen: dict[str, Any]) -> None:
    """The recipe with the chosen layout; its name is the file's."""
    from distill.run_dir import recipe_text, write_text

    options = {name: value for name, value in chosen["options"].items() if value is not None}
    unnamed = recipe.model_copy()
    unnamed.model_fields_set.discard("name")
    write_text(file, f"# The layout was selected: {options}\n{recipe_text(unnamed)}")


make_callable(__name__)
