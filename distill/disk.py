"""Files that cannot be written, said as which and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from distill.errors import UserError

FIX = "make room there or use another folder, and give the same command again"


@contextmanager
def writing(what: str | Path, fix: str = FIX) -> Iterator[None]:
    """Turn what a full or read-only disk raises inside the block into a message.

    Raises:
        UserError: naming what could not be written, the system's reason, and the fix.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what} could not be written ({error}); {fix}") from error


def check_writable(path: Path, option: str) -> None:
    """See whether a file can be written; what is there stays, and nothing is left where nothing was.

    Raises:
        UserError: it cannot, naming the option that asks for it.
    """
    if not path.parent.is_dir():
        raise UserError(f"{option} is {path}, but there is no folder {path.parent}; make it, or name another file")
    new = not path.exists()
    try:
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise UserError(f"{option} is {path}, which cannot be written: {error.strerror}; name another file") from error
