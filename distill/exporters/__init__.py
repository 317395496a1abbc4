"""Students in forms that other software loads. The table of export targets, and what is the same for all of them.

To add one: a file beside this one with a `Target`, and a line here.
"""

from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import UserError, nearest, reason_of
from distill.exporters.target import Form, Target

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from distill.recipe import Recipe

EXPORTERS = {
    "gguf": "distill.exporters.gguf:Gguf",
    "native": "distill.exporters.native:Native",
    "portable": "distill.exporters.portable:Portable",
}
MARKER = ".exported-by-distill"  # in every folder written; holds the target's name


def target(name: str) -> Target:
    """A target of the table.

    Raises:
        UserError: there is none of that name.
    """
    if name not in EXPORTERS:
        raise UserError(f"there is no export target {name!r}; {nearest(name, EXPORTERS)}")
    module, _, attribute = EXPORTERS[name].partition(":")
    return getattr(import_module(module), attribute)()


def help_lines() -> str:
    """Every target with its line, for `--help`."""
    return "; ".join(f"{name}: {target(name).line}" for name in EXPORTERS)


def check_targets(recipe: "Recipe", where: str) -> None:
    """Refuse targets that do not exist.

    Raises:
        UserError: naming the target and the nearest one.
    """
    for name in recipe.export:
        if name not in EXPORTERS:
            raise UserError(f"{where}: export: there is no target {name!r}; {nearest(name, EXPORTERS)}")


def check_exports(recipe: "Recipe", student: "PretrainedConfig") -> None:
    """Refuse targets that cannot hold a student, before anything is trained.

    Args:
        student: its config.

    Raises:
        UserError: naming the target and why it refuses.
    """
    from distill.exporters.source import Source

    source = Source.of(student)
    for name in recipe.export:
        if reason := target(name).refuses(source):
            raise UserError(f"{recipe.name}: export: {name} cannot hold this student: {reason}")


def export_student(run_folder: str | PathLike, *, to: str = "portable", out: str | Path) -> Path:
    """Write the finished student of a run for other software.

    The folder is written beside `out` and then renamed, so that a half-written one never stands there.

    Args:
        to: the target.

    Returns:
        the folder written.

    Raises:
        UserError: no such target, a run without a finished student, a folder in the way, or one that cannot be written.
    """
    from safetensors import SafetensorError

    from distill.disk import new_folder, sweep
    from distill.runs.run_dir import RunDir

    chosen = target(to)
    folder, out = RunDir.existing(run_folder), Path(out)
    if not folder.student.exists():
        raise UserError(f"{folder.path} has no finished student yet; {folder.why_unfinished}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder to write the export into")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise UserError(f"{out} is not empty, and was not written by an export; choose another folder")
    for path in folder.student.rglob("*"):
        if path.is_symlink():
            raise UserError(f"{path} is a link, and an export takes no file from elsewhere along; put the file itself there")
    try:
        sweep(out.parent)
        with new_folder(out) as scratch:
            scratch.rmdir()  # targets make it
            try:
                chosen.write(folder.student, scratch, Form())
            except (LookupError, TypeError, ValueError) as error:  # of files that were edited
                said = reason_of(error) if type(error) is ValueError else "its files were edited"
                raise UserError(
                    f"the student in {folder.student} cannot be exported: {said}; delete it, and the same `distill "
                    "run` saves it again"
                ) from error
            (scratch / MARKER).write_text(f"{to}\n")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the export to {out} could not be written: {str(error) or reason_of(error)}; make room there, or name another "
            "folder"
        ) from error
    return out
