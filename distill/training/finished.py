"""Finished runs: running one again makes missing parts of its end, such as a deleted report or export."""

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
    """The folder of a finished run, after making missing parts of its end and showing its results; None if the run has to
    train or save its student.

    Raises:
        UserError: the folder belongs to another recipe, or the student and the checkpoint that it was saved from are gone.
    """
    folder = RunDir.finished(recipe, runs)
    if folder is None:
        return None
    laid_out = folder.laid_out()
    students = [folder, RunDir(folder.path / "twin")] if recipe.twin else [folder]
    for one in students:
        if not made(one, STUDENT, finished=True):
            _check_saved(one)
            console.print(f"  {one.student} lacks files; it is saved again from the last checkpoint")
            return None
    if gone := [part for part in parts_of(recipe) if not made(folder, part)]:
        if processes.count() > 1:
            raise UserError(f"{folder.path} lacks {', '.join(gone)}; one process makes these: leave out the launcher")
        console.print(f"  {folder.path} lacks {', '.join(gone)}; making them again")
        with alone(folder.path):
            _mend(laid_out, folder, console)
    else:
        console.print(f"  {folder.path} is finished; --fresh trains it again", highlight=False)
    show_end(folder, console)
    return folder


def _mend(recipe: Recipe, folder: RunDir, console: Console) -> None:
    """Make the missing parts of a run with a saved student. The teacher is loaded only if a part needs it."""
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
    """Refuse a finished run whose student and last checkpoint are both gone, instead of training it again.

    Raises:
        UserError: naming both, and the fix.
    """
    path = checkpoint.latest(folder.checkpoints)
    state = checkpoint.read_state(path, files=False) if path else None
    if state is None or not state.done or state.stage != len(folder.laid_out().stages) - 1:
        raise UserError(
            f"{folder.path}: this run is finished, but its student in {folder.student} lacks files, and the checkpoint that "
            f"it was saved from is gone; restore one of them, or train again with --fresh"
        )


def write_down_export(run: Path, written: Path) -> None:
    """Record an export that was made by hand in the place of one of the recipe's exports, so that the run has it."""
    folder = RunDir(run)
    part = f"export/{written.name}"
    if not (run / "recipe.yaml").is_file() or written.resolve() != (run / part).resolve():
        return
    if written.name in folder.recipe().export:
        of = folder.read("run.json", {}).get("ended", {}).get(STUDENT, {}).get("of", "")
        write_down(folder, part, of, exported_files(run / part))
