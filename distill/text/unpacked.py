"""Reads a file, packed or plain, as bytes or lines; errors name the line that is cut off, too long or not text."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.errors import UserError, named
from teachers.cache import CacheError

MAGIC = {b"\x1f\x8b": "gz", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zst", b"BZh": "bz2"}
NAMED = {".gz": "gz", ".xz": "xz", ".zst": "zst", ".bz2": "bz2"}
PLAIN = ("gz", "xz", "zst")  # unpacked even where the name does not say so; not bz2, since text may begin with BZh
LONGER = "cut it into documents, leave it out, or set data.longest_document higher: memory grows with it"


class CutOffError(EOFError):
    """A packed file that ends before its content does."""


@contextmanager
def unpacked(path: str | Path, where: str) -> Iterator[io.BufferedIOBase]:
    """A file's bytes as a stream, unpacked as its first bytes say.

    Raises:
        UserError: the file cannot be opened, or is not packed as its name says. Reading may raise errors for `explained`.
    """
    name, packing = named(path), None
    try:
        with open(path, "rb") as file:
            first = file.read(6)
    except OSError as error:
        raise UserError(f"{where}: {name} cannot be read: {error.strerror}") from error
    promised = next((kind for ending, kind in NAMED.items() if str(path).endswith(ending)), None)
    packing = next((kind for magic, kind in MAGIC.items() if first.startswith(magic) and kind in (promised, *PLAIN)), None)
    if promised is not None and packing != promised:
        raise UserError(
            f"{where}: {name} is not a .{promised} file: it begins with {first!r}; fetch it again, or correct its ending"
        )
    with _opened(path, packing) as stream:
        yield stream


def _opened(path: str | Path, packing: str | None) -> io.BufferedIOBase:
    if packing == "zst":
        return io.BufferedReader(_Zstandard(path))
    ways: dict[str | None, Callable[..., Any]] = {"gz": gzip.open, "xz": lzma.open, "bz2": bz2.open, None: open}
    return ways[packing](path, "rb")


class _Zstandard(io.RawIOBase):
    """A zstandard stream, which raises `CutOffError` where the file is cut off."""

    def __init__(self, path: str | Path) -> None:
        import pyarrow

        self._stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            found = self._stream.read(len(buffer))
        except OSError as error:
            if "truncated" in str(error).lower():
                raise CutOffError(str(error)) from error
            raise
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


@contextmanager
def explained(path: str | Path, where: str, place: "Place") -> Iterator[None]:
    """Turn what reading a file raises inside the block into a UserError that says how far it could be read."""
    try:
        yield
    except (UserError, CacheError):
        raise
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: {named(path)}, {place}, is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}; "
            "convert the file, with iconv for example"
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, EOFError):
            raise UserError(f"{where}: {named(path)} ends early, {place.behind}: it is cut off; fetch it again") from error
        raise UserError(f"{where}: {named(path)} could not be read {place.behind}: {said}; fetch it again") from error


class Place:
    """A place in a file: how far it was read."""

    def __init__(self, word: str = "line") -> None:
        self.word, self.number = word, 0

    def __str__(self) -> str:
        return f"{self.word} {self.number}"

    @property
    def behind(self) -> str:
        """Where reading stopped."""
        return f"after {self}" if self.number else f"before its first {self.word} ends"


def lines(path: str | Path, where: str, longest: int, place: Place, longer: str = LONGER) -> Iterator[str]:
    """A file's lines as text, their ends included; `place` says which was last.

    Args:
        longest: the most bytes that a line may have. longer: advice for longer lines.

    Raises:
        UserError: the file cannot be read to its end, or a line is too long or not UTF-8.
    """
    with unpacked(path, where) as stream, explained(path, where, place):
        while line := stream.readline(longest + 1):
            place.number += 1
            if len(line) > longest:
                raise too_long(path, where, str(place), longest, longer)
            yield line.decode("utf-8-sig" if place.number == 1 else "utf-8")


def too_long(path: str | Path, where: str, place: str, longest: int, longer: str = LONGER) -> UserError:
    """The error for a document that is too long."""
    return UserError(
        f"{where}: {named(path)}, {place}, is longer than {longest:,} bytes, the most that it may have; {longer}"
    )
