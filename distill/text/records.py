"""A file's records as rows: the text or chat of each record, and its label."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.errors import UserError, brief, named
from distill.text.files import TextFile
from distill.text.pairs import columns_of, row_of
from distill.text.rows import Rows
from distill.text.unpacked import too_long

NAMES = 20  # columns that a message lists
LABEL = 1000  # characters that a label may have


@dataclass(frozen=True)
class Reading:
    """A file and the options for reading it.

    column: the column with the text. label: the label of every row; None takes it from the column `source` where there is
    one. documents: what part of a .txt file is a document. longest: the most bytes that a document may have. scratch: a
    folder in which a file is unpacked. tick: called at every row. train_on: the source's.
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
    """Add a row for each record. records: with places in the file. columns: the file's, where records hold only some."""
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
    """The bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _check_text(reading: Reading, place: str, text: str) -> None:
    """Refuse text that UTF-8 cannot encode, or that is too long."""
    try:
        if size(text) > reading.longest:
            raise too_long(reading.file.path, reading.where, place, reading.longest)
    except UnicodeEncodeError as error:
        raise UserError(
            f"{reading.where}: {named(reading.file.path)}, {place}: the column {reading.column!r} holds half of a "
            f"surrogate pair ({text[error.start]!a}), which is not text; write the character whole"
        ) from error


def _source(reading: Reading, place: str, source: object) -> str:
    """The label of a row by its column `source`; the file's label where that is null."""
    if source is None:
        return reading.file.label
    if not isinstance(source, str | int | float) or len(str(source)) > LABEL:
        raise UserError(
            f"{reading.where}: {named(reading.file.path)}, {place}: source is {brief(source)}, which is not a name; write "
            "a short one, or give the source a label"
        )
    return str(source)


def listed(names: Iterable[str]) -> str:
    shown = [named(name, 40) for name in names]
    return ", ".join(shown[:NAMES]) + (" ..." if len(shown) > NAMES else "")
