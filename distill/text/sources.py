"""Sources of text as rows of `label` and `text`, whatever their columns are called, in an order that a seed fixes.

`readers` reads local files; `data_sets` reads data sets, by their name on the hub or from their folder. A row is a document,
or several (`encoding.Documents`). A .txt file is one row, unless the source says `documents`.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import cast

from distill.console import Ticker
from distill.recipe import TextSource
from distill.text.data_sets import data_set, said
from distill.text.files import TextFile
from distill.text.readers import read
from distill.text.records import Reading
from distill.text.rows import Chat, Rows

Group = Sequence[tuple[TextSource, Sequence[TextFile], str]]  # sources, each with its files and its key in the recipe


@dataclass(frozen=True)
class Stream:
    """A source's rows. rows: takes a pass (the first is 0) and the first row; yields label and text. count, size: the rows
    and the bytes of text in a pass; None for a streamed data set."""

    rows: Callable[[int, int], Iterator[tuple[str, str]]]
    count: int | None = None
    size: int | None = None


def streams(
    sources: Sequence[TextSource],
    files: Sequence[Sequence[TextFile]],
    seed: int,
    where: str,
    reading: Path,
    longest: int,
) -> list[Stream]:
    """One stream of all sources shuffled together, or, where any has a weight, one stream for each source.

    Args:
        reading: a folder for rows that were read, removed by the caller. longest: the most bytes that a document may have.

    Raises (some only when rows are drawn):
        UserError: a source cannot be read, or a column does not exist or does not hold text.
    """
    group = [(source, own, f"{where}.{k}") for k, (source, own) in enumerate(zip(sources, files, strict=True))]
    groups = [[one] for one in group] if any(source.weight is not None for source in sources) else [group]
    return [_stream(one, seed, where, reading / str(k), longest) for k, one in enumerate(groups)]


def _stream(group: Group, seed: int, where: str, reading: Path, longest: int) -> Stream:
    if all(source.path is not None for source, _, _ in group):
        rows = _rows(group, reading, longest)
        return Stream(lambda turn, first: rows.shuffled(seed + turn, first), rows.count, rows.size)
    return _streamed(group, seed, where, reading, longest)


def _told(rows: Rows, where: str) -> str:
    return f"{where}: {rows.count:,} rows read, {rows.size / 1e6:,.0f} MB of text"


def _rows(group: Group, reading: Path, longest: int) -> Rows:
    """The rows of local files, one file after the other."""
    if (left := Rows.left(reading)) is not None:
        return left
    rows, whole = Rows(reading), False
    try:
        for source, files, where in group:
            ticker = Ticker(partial(_told, rows, where))
            for file in files:
                options = (source.column, source.label, source.documents or "file", longest, reading, ticker.tick)
                read(Reading(file, where, *options, source.train_on), rows)
        whole = True
    finally:
        rows.close(whole)
    return rows


def _streamed(group: Group, seed: int, where: str, reading: Path, longest: int) -> Stream:
    """The stream of data sets, and of local files mixed with them; from the hub only the rows that are used are fetched."""
    import datasets

    datasets.disable_progress_bars()
    shutil.rmtree(reading, ignore_errors=True)  # of an earlier attempt
    tables = []
    for k, (source, files, key) in enumerate(group):
        if source.path is None:
            tables.append(data_set(source, files, key, reading / str(k), longest))
        else:
            tables.append(_table(_rows([(source, files, key)], reading / str(k), longest)))
    sets = [(cast(str, source.hub), files, key) for source, files, key in group if source.path is None]
    called, key = (sets[0][0], sets[0][2]) if len(group) == 1 else (", ".join(name for name, _, _ in sets), where)
    local = [file for _, files, _ in sets for file in files]
    with said(key, called, local, longest):  # it draws the first rows
        joined = datasets.concatenate_datasets(tables)

    def rows(turn: int, first: int) -> Iterator[tuple[str, str]]:
        with said(key, called, local, longest):
            for row in islice(joined.shuffle(seed=seed + turn), first, None):
                yield row["label"], Chat(row["text"]) if row["chat"] else row["text"]

    return Stream(rows)


def _table(rows: Rows):
    """Local rows as an `IterableDataset` of `datasets`."""
    import datasets

    text = datasets.Value("string")
    return datasets.IterableDataset.from_generator(
        _records, features=datasets.Features(label=text, text=text, chat=datasets.Value("bool")), gen_kwargs={"rows": rows}
    )


def _records(rows: Rows) -> Iterator[dict[str, str | bool]]:
    for label, text in rows.read(range(rows.count)):
        yield {"label": label, "text": text, "chat": isinstance(text, Chat)}
