"""The folder of an export: where it may lie, which of its files are the user's, and how a new export replaces an old one.

Every export holds a list of its files with their hashes. All other files in the folder are the user's own (notes, a
quantised copy), and a new export keeps them. A new export is refused if a file of the earlier export was changed, or if a
user's file has a name that the new export needs: one of the two files would be lost. The message names the file.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from distill.disk import check_name, file_hash, refuse_link, scratch_beside, sweep
from distill.errors import UserError, named
from distill.reading import read_json
from distill.runs.records import Record

MARKER = ".exported-by-distill"  # a file in every export: the target, and the list of the export's files
README = "README.md"
ELSEWHERE = "or choose another folder with --out"
OWN_LIST = "it says which files are the export's: take your own files out and delete the folder, " + ELSEWHERE


class Written(Record):
    """The content of the marker file: the target, and the SHA-256 of each file by its path."""

    target: str
    files: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]


WRITTEN = TypeAdapter(Written)


@dataclass(frozen=True)
class Place:
    """A folder that an export may be written to. own: the user's files in it, by relative path."""

    path: Path
    own: list[str] = field(default_factory=list)

    @classmethod
    def checked(cls, path: Path, run: Path, student: Path) -> "Place":
        """Check that an export may be written to a folder, before anything is written.

        Args:
            run, student: folders that the export must not replace.

        Raises:
            UserError: the path is a file or a link; it is or contains the working folder, the run folder or the student's
                folder; it lies inside the student's folder; or it holds files but no export.
        """
        check_name(path)
        refuse_link(path)
        _check_where(path, run, student)
        earlier = _aside(path)
        refuse_link(earlier)
        if os.path.lexists(earlier) and not os.path.lexists(path):  # an export was killed between its two renames
            earlier.rename(path)
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"{path} is a file; name a folder to write the export into")
        if not path.exists() or not any(path.iterdir()):
            return cls(path)
        if not os.path.lexists(path / MARKER):
            raise UserError(f"{path} is not empty, and was not written by an export; choose another folder")
        return cls(path, _own_files(path))

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse names that would overwrite a user's file.

        Raises:
            UserError: naming the first such file.
        """
        needed = set(names)
        folders = {str(parent) for name in needed for parent in Path(name).parents}
        for mine in self.own:
            above = {str(parent) for parent in Path(mine).parents}
            if mine in needed or mine in folders or above & needed:
                raise UserError(
                    f"{self.path / mine} is not of the earlier export in {self.path}, and the new export has a file of that "
                    f"name; move yours away, {ELSEWHERE}"
                )

    @contextmanager
    def new(self) -> Iterator[Path]:
        """Yield a new folder next to this one, and rename it to this one's path when the block succeeds.

        The user's files are carried over. The new folder is deleted if the block fails. The earlier export is not touched
        before the renaming.

        Raises:
            OSError: the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        sweep(self.path.parent)
        scratch = scratch_beside(self.path)
        try:
            yield scratch
            for name in self.own:
                _carry(self.path / name, scratch / name)
            self._swap(scratch)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _swap(self, scratch: Path) -> None:
        """Replace the earlier export. If this is killed between its two renames, the next export restores that one."""
        earlier = _aside(self.path)
        if earlier.is_dir():  # left by an export that was killed after its second rename
            shutil.rmtree(earlier)
        if self.path.exists():
            self.path.rename(earlier)
        try:
            scratch.rename(self.path)
        except OSError:
            with suppress(OSError):
                earlier.rename(self.path)
            raise
        shutil.rmtree(earlier, ignore_errors=True)


def mark(folder: Path, target: str) -> list[str]:
    """Write the marker file: the target and the hashes of the export's files. Returns the files' relative paths."""
    files = {name: file_hash(folder / name) for name in paths_in(folder)}
    (folder / MARKER).write_text(json.dumps({"target": target, "files": files}, indent=1) + "\n")
    return sorted(files)


def paths_in(folder: Path) -> list[str]:
    """Return the relative paths of all files, links and empty folders in a folder."""
    found = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        linked = [name for name in folders if (here / name).is_symlink()]
        found += [here / name for name in [*files, *linked]]
        if not files and not folders and here != folder:
            found.append(here)
    return sorted(str(path.relative_to(folder)) for path in found)


def _own_files(path: Path) -> list[str]:
    """Return the user's files in the folder of an earlier export.

    Raises:
        UserError: the earlier export has no list of its files, or one of them was changed.
    """
    marker = path / MARKER
    refuse_link(marker)
    text = marker.read_text(errors="replace") if marker.is_file() else ""
    if not text.lstrip().startswith("{"):
        raise UserError(
            f"{path} holds an export of an earlier version, whose {MARKER} lacks the list of its files, so it is not known "
            f"which files are yours: take yours out and delete the folder, {ELSEWHERE}"
        )
    listed = read_json(marker, WRITTEN, fix=OWN_LIST)["files"]
    found = paths_in(path)
    for name in sorted(set(found) & set(listed)):
        file = path / name
        if file.is_symlink() or not file.is_file() or file_hash(file) != listed[name]:
            raise UserError(
                f"{file} was changed since it was exported, and a new export would replace it; move it away, {ELSEWHERE}"
            )
    own = [name for name in found if name not in listed and name != MARKER]
    if README in own:
        raise UserError(
            f"{path / README} is not of the earlier export there, and every export writes one; move it away, {ELSEWHERE}"
        )
    for name in own:
        file = path / name
        if not (file.is_symlink() or file.is_file() or file.is_dir()):
            raise UserError(
                f"{path / named(name)} is not a plain file and cannot be carried over; move it away, {ELSEWHERE}"
            )
    return own


def _check_where(path: Path, run: Path, student: Path) -> None:
    """Refuse a folder that is, contains or lies inside a folder that an export must not replace."""
    real = Path(os.path.realpath(path))
    if real == Path.cwd():
        raise UserError(f"--out is {str(path) or '.'!r}, the folder that this command runs in; name a new folder inside it")
    run, student, here = (Path(os.path.realpath(place)) for place in (run, student, Path.cwd()))
    for place, what in ((run, "the run folder itself"), (student, "the student's own folder")):
        if real == place:
            raise UserError(f"{path} is {what}, and an export would replace it; choose another folder")
    for place, what in (
        (run, "the run folder"),
        (student, "the student's folder"),
        (here, "the folder this command runs in"),
    ):
        if place.is_relative_to(real):
            raise UserError(f"{path} holds {what} {place.name}, and an export would replace both; choose another folder")
    if real.is_relative_to(student):
        raise UserError(f"{path} lies inside the student's folder {student.name}; choose a folder outside it")


def _carry(mine: Path, to: Path) -> None:
    """Carry a user's file into the new folder: a hard link where the disk has them, else a copy."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if mine.is_dir() and not mine.is_symlink():
        to.mkdir(exist_ok=True)
        return
    try:
        os.link(mine, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(mine, to, follow_symlinks=False)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.earlier")


def listed(folder: Path) -> list[str]:
    """Return the relative paths of the files that an export wrote.

    Raises:
        UserError: the list is damaged.
    """
    return sorted(read_json(folder / MARKER, WRITTEN, fix=OWN_LIST)["files"])
