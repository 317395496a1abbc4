"""Safe reading of files: plain files of bounded size, UTF-8 text, standard JSON, and arrays without pickles.

An invalid file ends in one `UserError` with the file's name, what is wrong in it, and the fix.
"""

import io
import json
import math
import os
import reprlib
import stat
import zipfile
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from distill.errors import UserError, reason_of

if TYPE_CHECKING:
    import numpy as np

MOST_BYTES = 64 * 2**20  # of a JSON file; a thousand times the size of a run's files
MOST_DEPTH = 64  # of nested lists and mappings
MOST_DIGITS = 18  # of a whole number, so that it fits into 64 bits
MOST_LINE = 2**20  # bytes of a line of JSON lines
MOST_LINES_BYTES = 256 * 2**20  # of a file of JSON lines
ARRAY_KINDS = "fiub"  # floats, whole numbers, booleans: what an array may hold


class Unreadable(ValueError):
    """The reason why content is invalid. The caller, which knows the file, makes a message of it."""


def read_bytes(file: Path, *, most: int, fix: str) -> bytes:
    """Read a plain file.

    Args:
        most: the largest size in bytes. fix: what to do about an invalid file, for the message.

    Raises:
        UserError: there is no such file, it is a folder or a pipe, it cannot be read, or it is larger than `most`.
    """
    try:
        known = os.stat(file)
        if not stat.S_ISREG(known.st_mode):
            raise UserError(f"{file} is {'a folder' if stat.S_ISDIR(known.st_mode) else 'not a plain file'}; {fix}")
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as opened:
            content = opened.read(most + 1) if known.st_size <= most else None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {reason_of(error)}; {fix}") from error
    except ValueError as error:
        raise UserError(f"{file} cannot be read: no file can have that name; {fix}") from error
    if content is None or len(content) > most:
        raise UserError(f"{file} is {size_of(max(known.st_size, most + 1))}, and at most {size_of(most)} are read; {fix}")
    return content


def read_text(file: Path, *, most: int, fix: str) -> str:
    """Read a plain file as text.

    Raises:
        UserError: as `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(file, most=most, fix=fix).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is damaged (byte {error.start} is not UTF-8); {fix}") from error


def read_json(file: Path, schema: TypeAdapter, *, fix: str, most: int = MOST_BYTES) -> Any:
    """Read a JSON file and check it by a schema. Returns the content unchanged.

    Raises:
        UserError: as `read_text`; or it is not JSON; or the schema refuses it, naming the place.
    """
    text = read_text(file, most=most, fix=fix)
    try:
        return checked(parsed(text), schema)
    except Unreadable as error:
        raise UserError(f"{file} is damaged ({error}); {fix}") from error


def read_lines(file: Path, schema: TypeAdapter, *, fix: str) -> list[Any]:
    """Read a file of JSON lines and check each by a schema. An incomplete last line, as after a kill, is left out.

    Raises:
        UserError: as `read_bytes`; or a line is not JSON or refused by the schema, naming the line.
    """
    lines = read_bytes(file, most=MOST_LINES_BYTES, fix=fix).split(b"\n")
    found, last = [], len(lines)
    for number, line in enumerate(lines, 1):
        if not line.strip() and number == last:
            break
        try:
            if len(line) > MOST_LINE:
                raise Unreadable(f"it is {size_of(len(line))} long, but a line may have at most {size_of(MOST_LINE)}")
            found.append(checked(parsed(line.decode()), schema))
        except (Unreadable, UnicodeDecodeError) as error:
            if number == last:
                break
            said = error if isinstance(error, Unreadable) else f"byte {error.start} is not UTF-8"
            raise UserError(f"{file} is damaged (line {number}: {said}); {fix}") from error
    return found


def parsed(text: str) -> Any:
    """Parse standard JSON within bounds.

    Raises:
        Unreadable: it is not JSON, a key is given twice, a number is not finite or too long, a text has a lone surrogate,
            or it is nested too deep.
    """
    if not text.strip():
        raise Unreadable("it is empty")
    try:
        content = json.loads(
            text, object_pairs_hook=_mapping, parse_constant=_no_number, parse_float=_finite, parse_int=_whole
        )
    except json.JSONDecodeError as error:
        ends = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        raise Unreadable(f"{'it ends early' if ends else error.msg}, line {error.lineno} column {error.colno}") from error
    except RecursionError as error:
        raise Unreadable(f"it is nested deeper than {MOST_DEPTH}") from error
    _check_depth(content)
    return content


def checked(content: Any, schema: TypeAdapter) -> Any:
    """Check content by a schema, and return it unchanged.

    Raises:
        Unreadable: naming the place, the value and what it should be.
    """
    try:
        schema.validate_python(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in problem["loc"]) or "it"
        if problem["type"] == "missing":
            raise Unreadable(f"{place} is missing") from error
        said = problem["msg"].removeprefix("Value error, ").replace("Input should", "it should")
        said = said.replace("valid dictionary", "valid mapping")
        raise Unreadable(f"{place} is {reprlib.repr(problem['input'])}: {said}") from error
    return content


def read_arrays(file: Path, *, fix: str, most: int = MOST_BYTES, dimensions: int = 2) -> "dict[str, np.ndarray]":
    """Read the arrays of a .npz file. Types and shapes are checked before memory is allocated; pickles are never opened.

    Args:
        most: the most bytes of the file, and of all its arrays together. dimensions: the number of dimensions of each array.

    Raises:
        UserError: as `read_bytes`; or it is not such an archive; or an array is not numeric, too large or incomplete.
    """
    content = read_bytes(file, most=most, fix=fix)
    try:
        return dict(_arrays(content, most, dimensions))
    except Unreadable as error:
        raise UserError(f"{file} is damaged ({error}); {fix}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise UserError(f"{file} is damaged ({reason_of(error)}); {fix}") from error


def size_of(count: int) -> str:
    """Format a number of bytes with a fitting unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} bytes"


def _arrays(content: bytes, most: int, dimensions: int) -> "Iterator[tuple[str, np.ndarray]]":
    import numpy as np

    if not content:
        raise Unreadable("it is empty")
    left = most
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for member in archive.infolist():
            with archive.open(member) as packed:
                try:
                    version = np.lib.format.read_magic(packed)
                    header = (
                        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                    )
                    shape, fortran, kind = header(packed)
                except (ValueError, TypeError, LookupError, SyntaxError) as error:
                    raise Unreadable(f"{member.filename} has no header of an array") from error
                if kind.kind not in ARRAY_KINDS or kind.hasobject:
                    raise Unreadable(f"{member.filename} holds {kind}, not numbers")
                if len(shape) != dimensions or any(length < 0 for length in shape):
                    raise Unreadable(f"{member.filename} has the shape {list(shape)}, not {dimensions} dimensions")
                size = prod(shape) * kind.itemsize
                left -= size
                if left < 0:
                    raise Unreadable(f"{member.filename} has the shape {list(shape)}: more than {size_of(most)} in all")
                data = packed.read(size)
                if len(data) != size:
                    raise Unreadable(f"{member.filename} ends early")
            array = np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C")
            yield member.filename.removesuffix(".npy"), array


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Unreadable(f"the key {reprlib.repr(key)} is given twice")
            seen.add(key)
    return found


def _no_number(word: str) -> None:
    raise Unreadable(f"{word} is not a finite number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise Unreadable(f"the number {reprlib.repr(digits)} is too large")
    return value


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise Unreadable(f"the number {reprlib.repr(digits)} has more than {MOST_DIGITS} digits")
    return int(digits)


def _check_depth(content: Any) -> None:
    waiting = [(content, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MOST_DEPTH:
            raise Unreadable(f"it is nested deeper than {MOST_DEPTH}")
        if isinstance(value, dict):
            waiting += [(part, depth + 1) for part in value.values()]
            waiting += [(key, depth) for key in value]
        elif isinstance(value, list):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise Unreadable(f"the text {reprlib.repr(value)} holds half a character (a lone surrogate)")
