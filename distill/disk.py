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
