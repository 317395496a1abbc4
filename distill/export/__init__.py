"""Students in forms that other software loads. The table of export targets: each writes a run's student into a folder.

To add one: a file beside this one and a line here.
"""

from importlib import import_module
from pathlib import Path

from distill.callable_package import make_callable
from distill.errors import UserError, nearest
from distill.run_dir import RunDir

EXPORTERS = {"portable": "distill.export.portable:export"}


def export(run_folder: str | Path, *, to: str = "portable", out: str | Path) -> Path:
    """Write the finished student of a run for other software.

    Args:
        to: the target; "portable" is a folder that transformers loads with trust_remote_code, without this project.

    Returns:
        the folder written.

    Raises:
        UserError: no such target, a run without a finished student, or a folder in the way.
    """
    if to not in EXPORTERS:
        raise UserError(f"there is no export target {to!r}; {nearest(to, EXPORTERS)}")
    folder = RunDir.existing(run_folder)
    if not folder.student.exists():
        raise UserError(f"{folder.path} has no finished student yet; the same `distill run` goes on with it")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder to write the export into")
    if out.exists() and any(out.iterdir()) and not (out / ".exported-by-distill").exists():
        raise UserError(f"{out} is not empty, and was not written by an export; choose another folder")
    module, _, function = EXPORTERS[to].partition(":")
    return getattr(import_module(module), function)(folder, out)


make_callable(__name__)
