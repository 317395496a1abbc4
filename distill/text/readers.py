"""Reads files as rows of text: JSON lines and JSON, CSV, parquet and plain text, each read piece by piece.

Every reader writes into `Rows`; its errors name the file, the line and the reason.
"""

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from distill.errors import UserError, named
from distill.text import json_file
from distill.text.files import PACKED
from distill.text.pairs import columns_of
from distill.text.records import Reading, add_records, listed, size
from distill.text.rows import Rows
from distill.text.unpacked import Place, explained, lines, too_long, unpacked
from teachers.cache import writing

BLOCK = 1 << 20  # characters of a text file read at a time
PARQUET_ROWS = 64  # read at a time
FIRST_LINES = re.compile(r"\A\s*\n")  # blank lines at the beginning
BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")


def read(reading: Reading, rows: Rows) -> None:
    """Write a file's rows, empty ones included.

    Raises:
        UserError: the file is damaged, a document is too long, or the column does not exist or does not hold text.
    """
    READERS[cast(str, reading.file.kind)](reading, rows)


def _json(reading: Reading, rows: Rows) -> None:
    place = Place()
    entries = json_file.entries(reading.file.path, reading.where, reading.longest, place)
    add_records(reading, rows, ((str(place), entry) for entry in entries))


def _csv(reading: Reading, rows: Rows) -> None:
    place = Place()
    csv.field_size_limit(max(csv.field_size_limit(), reading.longest))
    cells = _Cells(lines(reading.file.path, reading.where, reading.longest, place))
    with explained(reading.file.path, reading.where, place), _as_value_error():
        names = next(cells, None)
        if names is None:
            raise ValueError("it has no line that names its columns")
        add_records(reading, rows, ((str(place), _cells_by_name(names, row)) for row in cells))


@contextmanager
def _as_value_error() -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        raise ValueError(str(error)) from error


def _cells_by_name(names: list[str], row: list[str]) -> dict[str, str]:
    """The cells of a line by column; of columns with the same name the first counts, and missing cells are empty."""
    if len(row) > len(names):
        raise ValueError(
            f"the line has {len(row)} cells, the first line names {len(names)} columns; quote cells with commas"
        )
    cells = [*row, *[""] * (len(names) - len(row))]
    return dict(zip(reversed(names), reversed(cells), strict=True))


class _Cells:
    """The records of a CSV; blank lines between them are skipped."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self._inside = lines, False
        self._reader = csv.reader(self._given())

    def _given(self) -> Iterator[str]:
        for line in self._lines:
            if self._inside or line.strip():
                self._inside = True
                yield line
        if self._inside:
            raise ValueError("a quoted cell is never closed")

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        self._inside = False
        return next(self._reader)


def _parquet(reading: Reading, rows: Rows) -> None:
    place = Place("row")
    with _plain(reading) as path, explained(reading.file.path, reading.where, place), _arrow_as_value_error():
        from pyarrow import parquet

        names = parquet.read_schema(path).names
        wanted = columns_of(reading.column, names, reading.train_on)
        if not wanted:
            raise UserError(
                f"{reading.where}: there is no column {reading.column!r} in {named(reading.file.path)}; there are "
                f"{listed(names) or 'none'}"
            )
        wanted += [name for name in ("source",) if name in names and name not in wanted]
        plain = wanted[:1] if wanted[0] == reading.column else []
        file = parquet.ParquetFile(path, read_dictionary=plain, pre_buffer=False, buffer_size=BLOCK)
        add_records(reading, rows, _parquet_records(file, wanted, place), names)


@contextmanager
def _arrow_as_value_error() -> Iterator[None]:
    """Turn pyarrow's errors into ValueErrors: on damaged files they are of many types."""
    try:
        yield
    except (NotImplementedError, LookupError, TypeError) as error:
        raise ValueError(str(error)) from error


def _parquet_records(file, columns: list[str], place: Place) -> Iterator[tuple[str, dict]]:
    for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
        for index in range(batch.num_rows):
            place.number += 1
            yield str(place), {name: batch[name][index].as_py() for name in columns}


@contextmanager
def _plain(reading: Reading) -> Iterator[str]:
    """The path of a file that is read from its end (parquet), unpacked into `scratch` first where it is packed."""
    if Path(reading.file.path).suffix.lstrip(".") not in PACKED:
        yield reading.file.path
        return
    copy = reading.scratch / "unpacked"
    with unpacked(reading.file.path, reading.where) as stream, writing(copy), copy.open("wb") as target:
        while block := _block(reading, stream):
            target.write(block)
    yield str(copy)
    copy.unlink()


def _block(reading: Reading, stream: io.BufferedIOBase) -> bytes:
    with explained(reading.file.path, reading.where, Place("row")):
        return stream.read(BLOCK)


def _text(reading: Reading, rows: Rows) -> None:
    place = Place()
    if reading.column != "text":
        raise UserError(
            f"{reading.where}: there is no column {reading.column!r} in {named(reading.file.path)}, which is plain text"
        )
    with unpacked(reading.file.path, reading.where) as stream, explained(reading.file.path, reading.where, place):
        text = io.TextIOWrapper(cast(BinaryIO, stream), encoding="utf-8-sig")
        try:
            TEXTS[reading.documents](reading, rows, text, place)
        except UnicodeDecodeError:
            for _ in lines(reading.file.path, reading.where, reading.longest, Place()):
                pass  # this raises an error that names the line
            raise


def _as_one(reading: Reading, rows: Rows, text: io.TextIOBase, place: Place) -> None:
    rows.begin(reading.label or reading.file.label)
    begun = rows.size
    while block := text.read(BLOCK):
        rows.extend(block)
        place.number += block.count("\n")
        reading.tick()
        if rows.size - begun > reading.longest:
            raise too_long(reading.file.path, reading.where, str(place), reading.longest)


def _as_lines(reading: Reading, rows: Rows, text: io.TextIOBase, place: Place) -> None:
    for line in _text_lines(reading, text, place):
        rows.add(reading.label or reading.file.label, line.rstrip("\n"))


def _as_paragraphs(reading: Reading, rows: Rows, text: io.TextIOBase, place: Place) -> None:
    """A row for each paragraph: the lines between blank ones, which may hold spaces."""
    label, held_size = reading.label or reading.file.label, 0
    held: list[str] = []
    for line in _text_lines(reading, text, place):
        if line == "\n" and held:
            for part in paragraphs("".join(held).removesuffix("\n")):
                rows.add(label, part)
            held, held_size = [], 0
            continue
        held.append(line)
        held_size += size(line)
        if held_size > reading.longest:
            raise too_long(reading.file.path, reading.where, str(place), reading.longest)
    for part in paragraphs("".join(held)):
        rows.add(label, part)


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text; a text of only space is one empty paragraph."""
    return BLANK_LINE.split(FIRST_LINES.sub("", text).rstrip()) if text else []


def _text_lines(reading: Reading, text: io.TextIOBase, place: Place) -> Iterator[str]:
    while line := text.readline(reading.longest + 1):
        place.number += 1
        if size(line) > reading.longest:
            raise too_long(reading.file.path, reading.where, str(place), reading.longest)
        reading.tick()
        yield line


READERS = {"json": _json, "csv": _csv, "parquet": _parquet, "text": _text}
TEXTS = {"file": _as_one, "paragraphs": _as_paragraphs, "lines": _as_lines}
