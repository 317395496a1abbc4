"""Atomic writing of files and folders: into a new one in the target's folder, which is then renamed to the target.

Nothing is written through a symbolic link. A failed write is one `UserError` with the path, the reason and the fix.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from distill.errors import UserError, reason_of

FIX = "make room there or use another folder, and give the same command again"
SCRATCH = re.compile(r"\..*\.(\d{1,10})\.[a-z0-9_]{8}~")  # a file that is being written: a hidden name with the process id
NAME = 80  # characters of the target's name in the name of its scratch file


@contextmanager
def writing(what: str | Path, fix: str = FIX) -> Iterator[None]:
    """Turn the errors of a full or read-only disk inside the block into one message.

    Raises:
        UserError: naming the file that could not be written, the system's reason, and the fix.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error) or reason_of(error)  # it names the file inside a folder
        raise UserError(f"{what} could not be written ({reason}); {fix}") from error


def check_name(path: Path) -> None:
    """Refuse a path that no file can have, or that is not UTF-8, which some libraries cannot write to.

    Raises:
        UserError: naming it.
    """
    if "\0" in str(path):
        raise UserError(f"{path} is not a valid file name; name another")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} is not UTF-8 at character {error.start + 1}; name another folder or file") from error


def refuse_link(path: Path) -> None:
    """Refuse to write through a symbolic link, which could lead anywhere.

    Raises:
        UserError: naming the link and its target.
    """
    check_name(path)
    if path.is_symlink():
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, and nothing is written through links; remove it, or use another "
            "folder"
        )


def refuse_other(path: Path) -> None:
    """Refuse to replace anything but a plain file: a link, a folder, a device or a pipe.

    Raises:
        UserError: naming the path and what it is.
    """
    refuse_link(path)
    if os.path.lexists(path) and not path.is_file():
        raise UserError(
            f"{path} is {'a folder' if path.is_dir() else 'not a plain file'}, and is not overwritten; name another"
        )


def file_hash(name: str | Path) -> str:
    """The SHA-256 of a file."""
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_file(target: Path) -> Iterator[BinaryIO]:
    """Open a new file in the target's folder. It is renamed to the target if the block succeeds, and deleted if not.

    Raises:
        UserError: the target is not a plain file, or it cannot be written.
    """
    refuse_other(target)
    scratch = None
    try:
        handle, scratch = tempfile.mkstemp(prefix=_scratch(target), suffix="~", dir=target.parent)
        with open(handle, "wb") as opened:
            os.fchmod(handle, 0o666 & ~_mask())
            yield opened
        os.replace(scratch, target)
        scratch = None
    except OSError as error:
        raise UserError(f"{target} cannot be written: {reason_of(error)}; {FIX}") from error
    finally:
        if scratch is not None:
            with suppress(OSError):
                os.unlink(scratch)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Make a new folder beside the target. It replaces the target if the block succeeds, and is deleted if not.

    Raises:
        UserError: the target is a link. OSError: it cannot be written.
    """
    refuse_link(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_beside(target)
    try:
        yield scratch
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def scratch_beside(target: Path) -> Path:
    """Make a new folder beside a target, with a name that `sweep` recognises."""
    scratch = Path(tempfile.mkdtemp(prefix=_scratch(target), suffix="~", dir=target.parent))
    scratch.chmod(0o777 & ~_mask())
    return scratch


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        UserError: it is not a plain file, or it cannot be written.
    """
    with new_file(file) as opened:
        opened.write(text.encode(errors="backslashreplace"))  # for names that are not UTF-8


def append_line(file: Path, line: str) -> None:
    """Add a line to a text file.

    Raises:
        UserError: it is not a plain file, or it cannot be written.
    """
    refuse_other(file)
    with writing(file):
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        with open(handle, "a", encoding="utf-8") as lines:
            lines.write(line + "\n")


def sweep(folder: Path) -> None:
    """Delete the scratch files that processes which no longer exist left in a folder."""
    with suppress(OSError):
        dead = [path for path in folder.iterdir() if (found := SCRATCH.fullmatch(path.name)) and not _lives(int(found[1]))]
        for path in dead:
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_writable(path: Path, option: str) -> None:
    """Check that a file can be written, without changing it and without leaving a new one.

    Raises:
        UserError: it cannot, naming the option.
    """
    if not path.parent.is_dir():
        raise UserError(f"{option} is {path}, but there is no folder {path.parent}; make it, or name another file")
    try:
        if path.is_dir():
            raise UserError(f"{option} is {path}, which is a folder; name a file")
        refuse_other(path)
        with tempfile.TemporaryFile(prefix=_scratch(path), dir=path.parent):  # the file itself is only ever replaced
            pass
    except OSError as error:
        said = reason_of(error)
        raise UserError(f"{option} is {path}, which cannot be written: {said}; name another file") from error


def _scratch(target: Path) -> str:
    return f".{target.name[:NAME]}.{os.getpid()}."


def _mask() -> int:
    """The process's umask. It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process
        return True
    return True
