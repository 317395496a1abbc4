"""Files and folders written whole or not at all: into a new one beside the target, which then takes its name.

Nothing is written through a link, and what cannot be written is said as which, why and what to do.
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
SCRATCH = re.compile(r"\..*\.(\d{1,10})\.[a-z0-9_]{8}~")  # what is being written: a hidden name with the process's number
NAME = 80  # characters of the target's name in that of its scratch


@contextmanager
def writing(what: str | Path, fix: str = FIX) -> Iterator[None]:
    """Turn what a full or read-only disk raises inside the block into a message.

    Raises:
        UserError: naming what could not be written, the system's reason, and the fix.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error) or reason_of(error)  # it names the file inside, where there are several
        raise UserError(f"{what} could not be written ({reason}); {fix}") from error


def check_name(path: Path) -> None:
    """Refuse a name that no file can have, or that is no UTF-8, which libraries that write there cannot spell.

    Raises:
        UserError: naming it.
    """
    if "\0" in str(path):
        raise UserError(f"{path} is no name that a file can have; name another")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} is no UTF-8 at character {error.start + 1}; name another folder or file") from error


def refuse_link(path: Path) -> None:
    """Refuse to write where a link stands: it could lead anywhere.

    Raises:
        UserError: naming the link and where it leads.
    """
    check_name(path)
    if path.is_symlink():
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, and nothing is written through links; take it away, or use another "
            "folder"
        )


def refuse_other(path: Path) -> None:
    """Refuse to write a file where something else stands: a link, a folder, or a device or pipe, which a file that takes its
    name would remove from the machine.

    Raises:
        UserError: naming what stands there.
    """
    refuse_link(path)
    if os.path.lexists(path) and not path.is_file():
        raise UserError(
            f"{path} is {'a folder' if path.is_dir() else 'no plain file'}, and is not written over; name another"
        )


def file_hash(name: str | Path) -> str:
    """The SHA-256 of a file."""
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_file(target: Path) -> Iterator[BinaryIO]:
    """A new file in the target's folder, which takes the target's name when the block ends well, and goes when it does not.

    Raises:
        UserError: the target is no plain file, or it cannot be written.
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
    """A new folder beside the target, which takes its place when the block ends well, and goes when it does not.

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
    """A new folder beside a target, under a name by which `sweep` knows it."""
    scratch = Path(tempfile.mkdtemp(prefix=_scratch(target), suffix="~", dir=target.parent))
    scratch.chmod(0o777 & ~_mask())
    return scratch


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        UserError: it is a link, or the folder cannot be written to.
    """
    with new_file(file) as opened:
        opened.write(text.encode(errors="backslashreplace"))  # of names that are no UTF-8


def append_line(file: Path, line: str) -> None:
    """Add a line to a text file.

    Raises:
        UserError: it is a link, or cannot be written.
    """
    refuse_other(file)
    with writing(file):
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        with open(handle, "a", encoding="utf-8") as lines:
            lines.write(line + "\n")


def sweep(folder: Path) -> None:
    """Remove what processes that no longer live were writing in a folder when they ended."""
    with suppress(OSError):
        dead = [path for path in folder.iterdir() if (found := SCRATCH.fullmatch(path.name)) and not _lives(int(found[1]))]
        for path in dead:
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_writable(path: Path, option: str) -> None:
    """See whether a file can be written; what is there stays, and nothing is left where nothing was.

    Raises:
        UserError: it cannot, naming the option that asks for it.
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
    """The process's umask, which can only be asked for by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's
        return True
    return True
