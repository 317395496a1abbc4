"""Sources of text, read by `datasets`: local files, or a data set by its name on the hub (or its local folder), streamed.

Each source becomes rows of `label` and `text`, whatever its columns are called, in an order that a seed fixes.
"""

import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from distill.errors import UserError
from distill.recipe import TextSource
from distill.shipped import shipped_folder

SHIPPED = "shipped:"
KINDS = {"jsonl": "json", "json": "json", "parquet": "parquet", "txt": "text", "csv": "csv"}

Rows = Iterator[tuple[str, str]]  # label and text
Stream = Callable[[int], Rows]  # a source's rows in one pass over it, the first being 0


def files_of(source: TextSource, where: str) -> list[str]:
    """The local files of a source, sorted; none of a data set on the hub.

    Raises:
        UserError: no file matches.
    """
    if source.path is None:
        folder = Path(source.hub).expanduser()
        return sorted(str(path) for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    pattern = source.path
    if pattern.startswith(SHIPPED):
        pattern = str(shipped_folder() / "text" / pattern.removeprefix(SHIPPED))
    names = sorted(glob.glob(os.path.expanduser(pattern)))
    if not names:
        raise UserError(f"{where}: no file matches {source.path!r} (looked from {Path.cwd()})")
    return names


def streams(sources: Sequence[TextSource], files: Sequence[list[str]], seed: int, where: str) -> list[Stream]:
    """One stream of all sources shuffled together, or, where any has a weight, one a source.

    Raises (when drawn from):
        UserError: what cannot be read, or a column that is not there or holds no text.
    """
    import datasets

    datasets.disable_progress_bars()
    tables = [
        _table(source, names, f"{where}.{index}") for index, (source, names) in enumerate(zip(sources, files, strict=True))
    ]
    if any(source.weight is not None for source in sources):
        return [_stream([table], seed, f"{where}.{index}") for index, table in enumerate(tables)]
    return [_stream(tables, seed, where)]


def _stream(tables: Sequence, seed: int, where: str) -> Stream:
    import datasets

    if any(isinstance(table, datasets.IterableDataset) for table in tables):  # and cannot be joined to what is none
        tables = [t if isinstance(t, datasets.IterableDataset) else t.to_iterable_dataset() for t in tables]
    joined = datasets.concatenate_datasets(tables)

    def rows(turn: int) -> Rows:
        try:
            for row in joined.shuffle(seed=seed + turn):
                yield row["label"], row["text"]
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise UserError(f"{where} could not be read: {error}") from error

    return rows


def _table(source: TextSource, names: list[str], where: str):
    """A source's rows: of the hub streamed, so that no more is fetched than is used; of files read through a cache."""
    import datasets

    if source.path is None:
        return _labelled(
            _loaded(where, source.hub, source.hub, name=source.name, split=source.split, streaming=True), source, where
        )
    parts = [_loaded(where, name, _format(name, where), data_files=name, split="train") for name in names]
    return datasets.concatenate_datasets(
        [_labelled(part, source, where, _label(name)) for part, name in zip(parts, names, strict=True)]
    )


def _loaded(where: str, called: str, *arguments, **keywords):
    import datasets

    try:
        return datasets.load_dataset(*arguments, **keywords)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"{where}: {called} could not be read: {error}") from error


def _labelled(table, source: TextSource, where: str, usual: str | None = None):
    """The table in the two columns `label` and `text`."""
    columns = _columns(table, where)
    if source.column not in columns:
        raise UserError(f"{where}: there is no column {source.column!r}; there are {', '.join(columns) or 'none'}")
    label = source.label or (None if "source" in columns else usual or source.hub)
    options = {"column": source.column, "label": label, "where": where}
    return table.map(_as_label_and_text, fn_kwargs=options, remove_columns=columns)


def _columns(table, where: str) -> list[str]:
    """The table's columns; a stream may have to be asked for its first row."""
    if table.column_names is not None:
        return list(table.column_names)
    try:
        return list(next(iter(table), {}))
    except (OSError, ValueError) as error:
        raise UserError(f"{where} could not be read: {error}") from error


def _as_label_and_text(row: Mapping, column: str, label: str | None, where: str) -> dict[str, str]:
    """A plain function with plain arguments: `datasets` names what it caches by a hash of both."""
    text = row[column]
    if not isinstance(text, str | None):
        raise UserError(f"{where}: the column {column!r} holds {type(text).__name__}, not text; there are {', '.join(row)}")
    return {"label": str(row["source"]) if label is None else label, "text": text or ""}


def _format(name: str, where: str) -> str:
    found = {KINDS[suffix.lstrip(".")] for suffix in Path(name).suffixes if suffix.lstrip(".") in KINDS}
    if len(found) != 1:
        raise UserError(f"{where}: {name} is no text this can read; it reads {', '.join(KINDS)}, plain or .xz, .gz, .zst")
    return found.pop()


def _label(name: str) -> str:
    """What a file's text is called: its name up to the first dot, without a shard's number."""
    return re.sub(r"-\d+$", "", Path(name).name.split(".")[0])
