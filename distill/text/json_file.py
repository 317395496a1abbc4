"""Reads JSON files one entry at a time: an object a line, an array of objects or texts, or one object."""

import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import BinaryIO, cast

from distill.errors import UserError, brief, named
from distill.text.unpacked import Place, explained, lines, too_long, unpacked

BLOCK = 1 << 20  # characters of an array read at a time
SPACE = re.compile(r"[ \t\n\r]*")
EDGE = 16  # characters: an error so near to the end of what is held may only mean that the entry goes on
DIGITS = "Exceeds the limit"  # the beginning of Python's message for a number with too many digits


def entries(path: str, where: str, longest: int, place: Place) -> Iterator[Mapping]:
    """The objects of a file; a text of an array becomes {"text": it}. `place` says where the last one was.

    Raises:
        UserError: the file is cut off or not JSON, or an entry is too long or of another type.
    """
    with unpacked(path, where) as stream, explained(path, where, place):
        first = stream.read(1 << 10).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[":
        yield from _array(path, where, longest, place)
        return
    begun = False
    for line in lines(path, where, longest, place):
        if not line.strip():
            continue
        try:
            entry = loads(line)
        except ValueError as error:
            whole = None if begun else _whole(path, where, longest)
            if whole is None:
                raise UserError(f"{where}: {named(path)} could not be read: {place}: {error}; it should be JSON") from error
            yield from whole
            return
        begun = True
        if not isinstance(entry, dict):
            raise UserError(f'{where}: {named(path)}, {place}, is {brief(entry)}, not an object such as {{"text": ...}}')
        yield entry


def loads(text: str) -> object:
    """JSON as Python's values.

    Raises:
        ValueError: the text is not JSON, or cannot be read; the message says why in a few words.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        raise ValueError(_said(error)) from None


def _said(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return "a number has more digits than can be read" if str(error).startswith(DIGITS) else str(error)


def _whole(path: str, where: str, longest: int) -> list[Mapping] | None:
    """The entries of a file that is one object over several lines: that object, or its rows where it holds columns of one
    length. None for other files."""
    with unpacked(path, where) as stream, explained(path, where, Place()):
        content = stream.read(longest + 1)
    if len(content) > longest:
        return None
    try:
        found = loads(content.decode("utf-8-sig"))
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    lengths = {len(column) if isinstance(column, list) else None for column in found.values()}
    if len(lengths) == 1 and None not in lengths:
        return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
    return [found]


def _array(path: str, where: str, longest: int, place: Place) -> Iterator[Mapping]:
    """The entries of one array."""
    with unpacked(path, where) as stream, explained(path, where, place):
        place.number = 1
        text = _Text(io.TextIOWrapper(cast(BinaryIO, stream), encoding="utf-8-sig"), place)
        text.take("[")
        while not text.take("]"):
            entry = text.value(longest, lambda: too_long(path, where, str(place), longest))
            if not isinstance(entry, dict | str):
                raise UserError(f"{where}: {named(path)}, {place}, is {brief(entry)}, neither an object nor a text")
            yield {"text": entry} if isinstance(entry, str) else entry
            if not text.take(",") and not text.sees("]"):
                raise ValueError("an entry should be followed by , or ]")


class _Text:
    """JSON text that is read from its stream as far as it is needed."""

    def __init__(self, stream: io.TextIOBase, place: Place) -> None:
        self._stream, self._place, self._held, self._at = stream, place, "", 0

    def sees(self, sign: str) -> bool:
        """Whether a sign comes next, after any space.

        Raises:
            EOFError: the text ends.
        """
        while True:
            self._go(cast(re.Match, SPACE.match(self._held, self._at)).end())
            if self._at < len(self._held):
                return self._held[self._at] == sign
            if not self._more(BLOCK):
                raise EOFError

    def take(self, sign: str) -> bool:
        """Whether a sign comes next; it is consumed if so."""
        if seen := self.sees(sign):
            self._go(self._at + 1)
        return seen

    def value(self, longest: int, refusal) -> object:
        """The value that comes next."""
        self.sees("")
        while True:
            try:
                found, end = json.JSONDecoder().raw_decode(self._held, self._at)
                self._go(end)
                return found
            except RecursionError:
                raise ValueError("it is nested too deep") from None
            except ValueError as error:
                cut = len(self._held) - getattr(error, "pos", 0) < EDGE or "Unterminated" in str(error)
                held = len(self._held) - self._at
                if not cut:
                    raise ValueError(_said(error)) from None
                if held > longest:
                    raise refusal() from None
                if not self._more(max(BLOCK, held)):
                    raise EOFError from None

    def _go(self, to: int) -> None:
        self._place.number += self._held.count("\n", self._at, to)
        self._at = to

    def _more(self, count: int) -> bool:
        found = self._stream.read(count)
        self._held, self._at = self._held[self._at :] + found, 0
        return bool(found)
