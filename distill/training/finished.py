"""A run that is over and is given again, or whose parts are made by hand: what was deleted of its end is made once more."""

from pathlib import Path
from typing import Any

from rich.console import Console

from distill import processes
from distill.errors import UserError
from distill.loading import check_teacher, load_student
from distill.recipe import Recipe
from distill.runs import checkpoint
from distill.runs.run_dir import RunDir, alone
from distill.runs.session import Session
from distill.training.ending import STUDENT, Ending, exported_files, made, parts_of, show_end, write_down
from students.skeleton import Student


def finished(recipe: Recipe, runs: Path, console: Console) -> RunDir | None:
    """The folder of a run that is over, after making what was deleted of its end and showing how it ended; None where the
    run itself has something to do.

    Raises:
        UserError: the folder is another recipe's, or its student is gone with the checkpoint that could make it again.
    """
    folder = RunDir.finished(recipe, runs)
    if folder is None:
        return None
    laid_out = folder.laid_out()
    students = [folder, RunDir(folder.path / "twin")] if recipe.twin else [folder]
    for one in students:
        if not made(one, STUDENT, finished=True):
            _check_saved(one)
            console.print(f"  {one.student} is not whole any more; it is saved again from the last checkpoint")
            return None
    if gone := [part for part in parts_of(recipe) if not made(folder, part)]:
        if processes.count() > 1:
            raise UserError(f"{folder.path} lacks {', '.join(gone)}; one process makes that: leave out the launcher")
        console.print(f"  {folder.path} lacks {', '.join(gone)}: made again")
        with alone(folder.path):
            _mend(laid_out, folder, console)
    show_end(folder, console)
    return folder


def _mend(recipe: Recipe, folder: RunDir, console: Console) -> None:
    """Make what is missing beside a saved student; a teacher is loaded only where something has to be measured."""
    session = None

    def opened() -> Session:
        nonlocal session
        session = session or Session.open(recipe, folder.path)
        return session

    def student() -> Student:
        teacher = opened().teacher
        loaded: Any = load_student(folder.student)
        found = loaded.to(teacher.device)
        check_teacher(found, teacher, folder.student)
        return found

    of = folder.read("run.json", {}).get("ended", {}).get(STUDENT, {}).get("of", "")
    Ending(recipe, folder, console, opened, student, of).finish()


def _check_saved(folder: RunDir) -> None:
    """Refuse to train again unasked where the student of a finished run is gone and its last checkpoint too.

    Raises:
        UserError: naming both, and the fix.
    """
    path = checkpoint.latest(folder.checkpoints)
    state = checkpoint.read_state(path, files=False) if path else None
    if state is None or not state.done or state.stage != len(folder.laid_out().stages) - 1:
        raise UserError(
            f"{folder.path}: this run is finished, but its student in {folder.student} is not whole any more, and the "
            f"checkpoint that it was saved from is gone; bring one of them back, or train again with --fresh"
        )


def write_down_export(run: Path, written: Path) -> None:
    """Note an export that was made by hand in the place of one that a run ends with: the run then lacks it no more."""
    folder = RunDir(run)
    part = f"export/{written.name}"
    if not (run / "recipe.yaml").is_file() or written.resolve() != (run / part).resolve():
        return
    if written.name in folder.recipe().export:
        of = folder.read("run.json", {}).get("ended", {}).get(STUDENT, {}).get("of", "")
        write_down(folder, part, of, exported_files(run / part))
