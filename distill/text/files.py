"""The local files of a text source: which files match, the kind of each, and a check that each can be read."""

import errno
import glob
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from distill.errors import UserError, brief, named
from distill.recipe import TextSource
from distill.shipped import shipped_folder

SHIPPED = "shipped:"
KINDS = {"jsonl": "json", "json": "json", "parquet": "parquet", "txt": "text", "csv": "csv"}
PACKED = ("xz", "gz", "zst", "bz2")
MOST = 100_000  # files of a data set's folder; a folder with more is probably a whole disk, named by mistake


@dataclass(frozen=True)
class TextFile:
    """A file of a source, and how it is read.

    kind: a value of KINDS; None in a data set's folder, which `datasets` reads as a whole. label: the label of its text
    where no column has one; in a data set's folder, the file's path inside it.
    """

    path: str
    kind: str | None
    label: str


def files_of(source: TextSource, where: str) -> list[TextFile]:
    """The local files of a source, sorted; none for a data set on the hub.

    Raises:
        UserError: no file matches, or a file is a folder, empty, unreadable or of a kind that cannot be read.
    """
    if source.path is None:
        return _in_folder(source, where)
    names = _matching(source.path, where)
    if not names:
        raise UserError(f"{where}: no file matches {brief(source.path, 300)} (looked from {named(Path.cwd())})")
    for name in names:
        _check(name, where, f"name files in it, such as {named(name)}/*.jsonl, or the folder of a data set under hub")
    files = [TextFile(name, _kind(name, where), _label(name)) for name in names]
    if source.documents is not None and (others := [file.path for file in files if file.kind != "text"]):
        raise UserError(
            f"{where}: documents is {source.documents!r}, which is for .txt files, but {named(others[0])} is not one"
        )
    return files


def _matching(path: str, where: str) -> list[str]:
    """The names of the files that match a source's path."""
    if "\0" in path:
        raise UserError(f"{where}: no file matches {path!r}: a name cannot have a NUL in it")
    pattern = os.path.expanduser(path)
    if pattern.startswith(SHIPPED):
        folder, name = shipped_folder() / "text", pattern.removeprefix(SHIPPED)
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UserError(f"{where}: {path!r} leads out of the shipped text; name other files without {SHIPPED}")
        pattern = str(folder / name)
    try:
        return sorted(glob.glob(_only_what_is_not_there(pattern)))
    except (OSError, ValueError, re.error) as error:
        raise UserError(f"{where}: {path!r} is not a name or pattern of files: {error}") from error


def _only_what_is_not_there(pattern: str) -> str:
    """The pattern with its front escaped as far as it names existing folders and files: a name may hold [ and ]."""
    parts = Path(pattern).parts or (pattern,)
    known = max((count for count in range(1, len(parts) + 1) if os.path.lexists(os.path.join(*parts[:count]))), default=0)
    return os.path.join(*(glob.escape(part) for part in parts[:known]), *parts[known:])


def _in_folder(source: TextSource, where: str) -> list[TextFile]:
    """Every file of a data set's folder."""
    hub = cast(str, source.hub)
    if "\0" in hub:
        raise UserError(f"{where}: hub is {source.hub!r}: a name cannot have a NUL in it")
    folder = Path(hub).expanduser()
    if os.path.isfile(folder):
        raise UserError(f"{where}: hub is {source.hub!r}, which is a file; name it under path")
    if not os.path.isdir(folder):
        return []
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{where}: the folder {named(folder)} cannot be read: {os.strerror(errno.EACCES)}")
    found = []
    for path in folder.rglob("*"):
        if os.path.isfile(path):
            found.append(path)
        if len(found) > MOST:
            raise UserError(
                f"{where}: hub is {source.hub!r}, a folder with more than {MOST:,} files; name the folder of a data set"
            )
    for path in found:
        _check(str(path), where, "", empty=True)
    return [TextFile(str(path), None, str(path.relative_to(folder))) for path in sorted(found)]


def _check(name: str, where: str, instead: str, empty: bool = False) -> None:
    """Refuse anything but a plain file that can be read and is not empty. empty: whether it may be empty."""
    try:
        found = os.stat(name)
        if stat.S_ISREG(found.st_mode):
            open(name, "rb").close()
    except OSError as error:
        raise UserError(f"{where}: {named(name)} cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{where}: {named(name)} is a folder; {instead}")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{where}: {named(name)} is a pipe or a device, not a plain file; write the text into a file")
    if not found.st_size and not empty:
        raise UserError(f"{where}: {named(name)} is empty; remove it, or fetch it again")


def _kind(name: str, where: str) -> str:
    found = {KINDS[suffix.lstrip(".")] for suffix in Path(name).suffixes if suffix.lstrip(".") in KINDS}
    if len(found) != 1:
        packed = ", ".join(f".{ending}" for ending in PACKED)
        endings = ", ".join(KINDS)
        raise UserError(f"{where}: {named(name)} is not a file of text; text is read from {endings}, plain or {packed}")
    return found.pop()


def _label(name: str) -> str:
    """The label of a file's text: the file's name up to the first dot, without a shard's number."""
    return re.sub(r"-\d+$", "", Path(name).name.split(".")[0])
