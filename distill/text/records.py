"""A file's records as rows: of each the text or the chat, and what it is called."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.errors import UserError, brief, named
from distill.text.files import TextFile
from distill.text.pairs import columns_of, row_of
from distill.text.rows import Rows
from distill.text.unpacked import too_long

NAMES = 20  # columns that a message lists
LABEL = 1000  # characters that a source's name may have


@dataclass(frozen=True)
class Reading:
    """What is read of a file, and how.

    column: whose text. label: what every row is called; None takes the column `source` where there is one. documents: what
    of a .txt file is one. longest: bytes that a document may have. scratch: a place for a file to be unpacked in. tick:
    called with every row. train_on: as the source
    says.
    """

    file: TextFile
    where: str
    column: str
    label: str | None
    documents: str
    longest: int
    scratch: Path
    tick: Callable[[], None] = lambda: None
    train_on: str | None = None


def add_records(
    reading: Reading, rows: Rows, records: Iterator[tuple[str, Mapping]], columns: Sequence[str] | None = None
) -> None:
    """Rows of records, each with its place in the file. columns: of the file, where the records hold only some."""
    seen: dict[str, None] = {}
    found, column = False, reading.column
    for number, (place, record) in enumerate(records, start=1):
        reading.tick()
        if wanted := columns_of(column, record, reading.train_on):
            found = True
        elif len(seen) < NAMES:
            seen |= dict.fromkeys(record)
        text = None
        if wanted:
            where = f"{reading.where}: {named(reading.file.path)}, {place}"
            text = row_of(record, reading.train_on, where, number, wanted, columns or record)
        label = reading.label
        if label is None:
            label = _source(reading, place, record.get("source"))
        text = text or ""
        _check_text(reading, place, text)
        rows.add(label, text)
    if not found and not seen:
        raise UserError(f"{reading.where}: {named(reading.file.path)} holds no entry; remove it, or fetch it again")
    if not found:
        raise UserError(
            f"{reading.where}: there is no column {column!r} in {named(reading.file.path)}; there are {listed(seen)}"
        )


def size(text: str) -> int:
    """Bytes of a text's UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _check_text(reading: Reading, place: str, text: str) -> None:
    """Refuse text that UTF-8 has no bytes for, or too much of it."""
    try:
        if size(text) > reading.longest:
            raise too_long(reading.file.path, reading.where, place, reading.longest)
    except UnicodeEncodeError as error:
        raise UserError(
            f"{reading.where}: {named(reading.file.path)}, {place}: the column {reading.column!r} holds half of a pair "
            f"({text[error.start]!a}), which is no text; write the character whole"
        ) from error


def _source(reading: Reading, place: str, source: object) -> str:
    """What a row is called where its column `source` says."""
    if source is None:
        return reading.file.label
    if not isinstance(source, str | int | float) or len(str(source)) > LABEL:
        raise UserError(
            f"{reading.where}: {named(reading.file.path)}, {place}: source is {brief(source)}, which is no name; write a "
            "short one, or give the source a label"
        )
    return str(source)


def listed(names: Iterable[str]) -> str:
    shown = [named(name, 40) for name in names]
    return ", ".join(shown[:NAMES]) + (" ..." if len(shown) > NAMES else "")
