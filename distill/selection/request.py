"""The command `distill select`: makes a recipe ask for a selection, does it, and writes the recipe with the result."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from distill.console import new_console
from distill.disk import write_text
from distill.errors import UserError, printable
from distill.memory import enough_memory
from distill.ranges import KEPT
from distill.recipe import Recipe
from distill.runs.run_dir import RunDir, alone
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.selection import SCORERS, scorer_class
from distill.selection.checking import selection_options
from distill.selection.resolution import resolve, what_to_lower
from students.config import KEEP
from teachers.teacher import Teacher

DEFAULT = "recall"  # the scorer if neither recipe nor command names one


def select_layout(
    recipe: Recipe,
    check: Callable[[Recipe, Teacher], object],
    *,
    runs: str | Path,
    fresh: bool,
    write: str | Path | None,
    console: Console | None,
) -> dict[str, Any]:
    """Choose the layout of a recipe whose pattern asks for a selection; see `distill.select`.

    Args:
        check: refuses what a run would refuse, before anything is measured."""
    console = console or new_console(stderr=True)
    options = selection_options(recipe)
    trains = scorer_class(options.by).trains_on(options) > 0 or options.stand_in == "mixer"
    session = Session.open(recipe, trains=trains)
    check(recipe, session.teacher)
    main, path = session.accelerator.is_main_process, RunDir.path_of(recipe, Path(runs))
    with alone(path) if main else nullcontext():
        with session.accelerator.main_process_first():
            folder = RunDir.open(recipe, Path(runs), fresh and main)
        with enough_memory("the selection", what_to_lower(session)):
            resolved, chosen = resolve(session, folder, console if main else Console(quiet=True), Stopper())
    if write is not None and main:
        _write(resolved, Path(write), chosen)
    return {**chosen, "folder": str(folder.path)}


def ask_for_selection(entries: dict, where: str, by: str | None, keep: int | float | None, tasks: str | None) -> None:
    """Change a recipe's entries in place so that its pattern asks for a selection.

    Raises:
        UserError: neither the recipe's pattern nor --keep says how many layers to keep; --tasks does not fit the scorer.
    """
    pattern, keep = entries.get("pattern"), KEPT.check(keep, "--keep")
    scorer = by or (pattern.get("by") if isinstance(pattern, dict) else None) or DEFAULT
    reading = [name for name in SCORERS if "tasks" in scorer_class(name).Options.model_fields]
    if scorer in reading and tasks is None and not (isinstance(pattern, dict) and "tasks" in pattern):
        raise UserError(f"--by {scorer} needs a folder of task files: name it with --tasks FOLDER")
    if tasks is not None and scorer not in reading:
        raise UserError(f"--tasks goes with --by {' or '.join(reading)}, but the scorer is {scorer}")
    if isinstance(pattern, str):
        kept, rest = pattern.count(KEEP), pattern.replace(KEEP, "")
        if not kept and keep is None:
            raise UserError(f"{where}: the pattern {pattern!r} keeps no attention; give the number of layers with --keep")
        pattern = {"keep": kept / len(pattern) if keep is None else keep, "rest": rest} if rest else {"keep": keep}
    given = {"by": by, "keep": keep, "tasks": tasks}
    asked = {name: value for name, value in given.items() if value is not None}
    entries["pattern"] = {"by": DEFAULT, **pattern, **asked} if isinstance(pattern, dict) else pattern


def check_free(file: Path) -> None:
    """Refuse to write a recipe over another file, before anything is measured.

    Raises:
        UserError: naming the file.
    """
    if os.path.lexists(file):
        raise UserError(f"--write is {file}, which exists already; name another file")
    if not file.parent.is_dir():
        raise UserError(f"--write is {file}, but there is no folder {file.parent}; make it, or name another file")


def _write(recipe: Recipe, file: Path, chosen: dict[str, Any]) -> None:
    """Write the recipe with the chosen layout; its name is that of the file."""
    options = {name: value for name, value in chosen["options"].items() if value is not None}
    unnamed = recipe.model_copy()
    unnamed.model_fields_set.discard("name")
    write_text(file, f"# The layout was selected: {printable(options)}\n{unnamed.yaml()}")
