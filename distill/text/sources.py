"""Sources of text, read by `datasets`: local files, or a data set by its name on the hub (or its local folder), streamed.

Each source becomes rows of `label` and `text`, whatever its columns are called, in an order that a seed fixes. A row is a
document (or several: `encoding.Documents`); of a .txt file the whole file is one, unless the source says `documents`.
"""

import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distill.errors import UserError
from distill.recipe import TextSource
from distill.shipped import shipped_folder

SHIPPED = "shipped:"
KINDS = {"jsonl": "json", "json": "json", "parquet": "parquet", "txt": "text", "csv": "csv"}
DOCUMENTS = {"file": "document", "paragraphs": "paragraph", "lines": "line"}  # of a .txt file, and datasets' word for it
OPTIONS = {"csv": ("converters", "keep_default_na"), "text": ("sample_by",)}  # of `_options`, those that a kind knows
FIRST_LINES = re.compile(r"\A\s*\n")  # blank ones
BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")

Rows = Iterator[tuple[str, str]]  # label and text
Stream = Callable[[int], Rows]  # a source's rows in one pass over it, the first being 0


@dataclass(frozen=True)
class TextFile:
    """A file of a source, and how it is read: what `datasets` calls its kind (None: of a data set's folder, which `datasets`
    reads as a whole), and what its text is called where no column says (of a folder: its place in there)."""

    path: str
    kind: str | None
    label: str


def files_of(source: TextSource, where: str) -> list[TextFile]:
    """The local files of a source, sorted; none of a data set on the hub.

    Raises:
        UserError: no file matches, or one that is of no kind that can be read.
    """
    if source.path is None:
        folder = Path(source.hub).expanduser()
        found = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        return [TextFile(str(path), None, str(path.relative_to(folder))) for path in found]
    pattern = os.path.expanduser(source.path)
    if pattern.startswith(SHIPPED):
        pattern = str(shipped_folder() / "text" / pattern.removeprefix(SHIPPED))
    names = sorted(glob.glob(_only_what_is_not_there(pattern)))
    if not names:
        raise UserError(f"{where}: no file matches {source.path!r} (looked from {Path.cwd()})")
    files = [TextFile(name, _kind(name, where), _label(name)) for name in names]
    if source.documents is not None and (others := [file.path for file in files if file.kind != "text"]):
        raise UserError(f"{where}: documents is {source.documents!r}, which is about .txt files, but {others[0]} is none")
    return files


def _only_what_is_not_there(pattern: str) -> str:
    """The pattern with the folders and the file at its front that are there under just that name taken for themselves: a
    name may hold [ and ]."""
    parts = Path(pattern).parts or (pattern,)
    known = max((count for count in range(1, len(parts) + 1) if os.path.lexists(os.path.join(*parts[:count]))), default=0)
    return os.path.join(*(glob.escape(part) for part in parts[:known]), *parts[known:])


def streams(
    sources: Sequence[TextSource], files: Sequence[Sequence[TextFile]], seed: int, where: str, reading: Path
) -> list[Stream]:
    """One stream of all sources shuffled together, or, where any has a weight, one a source.

    Args:
        reading: a folder for what `datasets` makes of files. A cache of its own would be by their names, sizes and times,
            and know nothing of a file that was edited in place.

    Raises (when drawn from):
        UserError: what cannot be read, or a column that is not there or holds no text.
    """
    import datasets

    datasets.disable_progress_bars()
    tables = [
        _table(source, group, f"{where}.{index}", reading / str(index))
        for index, (source, group) in enumerate(zip(sources, files, strict=True))
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


def _table(source: TextSource, files: Sequence[TextFile], where: str, reading: Path):
    """A source's rows: of the hub streamed, so that no more is fetched than is used; of files read through a cache."""
    import datasets

    if source.path is None:
        return _labelled(_named_set(source, files, where, reading), source, where)
    reading.mkdir(parents=True)
    parts = [_labelled(_read(file, source, where, reading, index), source, where, file) for index, file in enumerate(files)]
    return datasets.concatenate_datasets(parts)


def _named_set(source: TextSource, files: Sequence[TextFile], where: str, reading: Path):
    """A data set by its name, or its local folder, streamed."""
    import datasets

    place = Path(source.hub).expanduser()
    name = str(place) if place.is_dir() else source.hub
    if files and glob.has_magic(name):  # datasets would take it for a pattern
        name = str(reading)
        for file in files:
            (reading / file.label).parent.mkdir(parents=True, exist_ok=True)
            (reading / file.label).symlink_to(os.path.abspath(file.path))
    with _reading(where, source.hub, (name, source.hub)):
        builder = datasets.load_dataset_builder(name, name=source.name)
        if source.documents is not None and not hasattr(builder.config, "sample_by"):
            raise UserError(
                f"{where}: documents is {source.documents!r}, which is about .txt files, but {source.hub} has none"
            )
        for option, value in _options(source).items():
            if hasattr(builder.config, option):  # of what kind its files are, the data set says
                setattr(builder.config, option, value)
        return builder.as_streaming_dataset(split=source.split)


def _read(file: TextFile, source: TextSource, where: str, reading: Path, index: int):
    """One file, through a link of a name that nobody takes for a pattern or a protocol."""
    import datasets

    link = reading / str(index)
    link.symlink_to(os.path.abspath(file.path))
    options = {name: value for name, value in _options(source).items() if name in OPTIONS.get(file.kind, ())}
    with _reading(where, file.path, (str(link), file.path)):
        return datasets.load_dataset(
            file.kind, data_files=glob.escape(str(link)), split="train", cache_dir=str(reading / "datasets"), **options
        )


def _options(source: TextSource) -> dict:
    """How `datasets` reads: a CSV's cells as they are written, NA and 007 too; a text as the source says."""
    cells = {"converters": {source.column: str, "source": str}, "keep_default_na": False}
    return {**cells, "sample_by": DOCUMENTS[source.documents or "file"]}


@contextmanager
def _reading(where: str, called: str, renamed: tuple[str, str]) -> Iterator[None]:
    """What `datasets` raises inside the block as a UserError, which says the file's own name for the link's."""
    import datasets

    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"{where}: {called} could not be read: {str(error).replace(*renamed)}") from error


def _labelled(table, source: TextSource, where: str, file: TextFile | None = None):
    """The table in the two columns `label` and `text`."""
    columns = _columns(table, where)
    if source.column not in columns:
        raise UserError(f"{where}: there is no column {source.column!r}; there are {', '.join(columns) or 'none'}")
    label = source.label or (None if "source" in columns else source.hub if file is None else file.label)
    options = {"column": source.column, "label": label, "where": where}
    if source.documents == "paragraphs":
        return table.map(_as_paragraphs, fn_kwargs=options, remove_columns=columns, batched=True)
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


def _as_paragraphs(rows: Mapping, column: str, label: str, where: str) -> dict[str, list[str]]:
    """As the function above, many rows at a time: what stands between blank lines, whatever space these hold."""
    texts = [part for text in rows[column] for part in BLANK_LINE.split(FIRST_LINES.sub("", text).rstrip())]
    return {"label": [label] * len(texts), "text": texts}


def _kind(name: str, where: str) -> str:
    found = {KINDS[suffix.lstrip(".")] for suffix in Path(name).suffixes if suffix.lstrip(".") in KINDS}
    if len(found) != 1:
        raise UserError(f"{where}: {name} is no text this can read; it reads {', '.join(KINDS)}, plain or .xz, .gz, .zst")
    return found.pop()


def _label(name: str) -> str:
    """What a file's text is called: its name up to the first dot, without a shard's number."""
    return re.sub(r"-\d+$", "", Path(name).name.split(".")[0])
