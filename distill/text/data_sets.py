"""Data sets of the hub or a local folder, streamed by `datasets`. A folder's description may name only its own files."""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import yaml

from distill.errors import UserError, brief, named
from distill.recipe import TextSource
from distill.text import json_file
from distill.text.files import KINDS, TextFile
from distill.text.pairs import columns_of, row_of
from distill.text.readers import paragraphs
from distill.text.records import size
from distill.text.rows import Chat
from distill.text.unpacked import LONGER, Place, lines
from teachers.cache import CacheError

DOCUMENTS = {"file": "document", "paragraphs": "paragraph", "lines": "line"}  # of .txt files: values of sample_by
DESCRIPTIONS = ("README.md", ".huggingface.yaml")  # files of a folder that may say which files are data
LARGEST = 1 << 20  # bytes of a description
DEEPEST = 50  # levels of its YAML


def data_set(source: TextSource, files: Sequence[TextFile], where: str, reading: Path, longest: int) -> Any:
    """The rows of a data set in the columns `label`, `text` and `chat`.

    Args:
        files: those of its local folder; none for the hub. reading: a folder that may be made, for links. longest: the most
            bytes that a document may have.

    Raises:
        UserError: the data set does not exist or is damaged, or its folder's description names files elsewhere.
    """
    import datasets

    hub = cast(str, source.hub)
    folder = Path(hub).expanduser()
    name = str(folder) if folder.is_dir() else hub
    if files:
        _check_descriptions(folder, where)
    if files and glob.has_magic(name):  # datasets would take it for a pattern
        name = str(reading)
        for file in files:
            (reading / file.label).parent.mkdir(parents=True, exist_ok=True)
            (reading / file.label).symlink_to(os.path.abspath(file.path))
    with said(where, hub, files, longest, (name, hub)):
        builder = datasets.load_dataset_builder(name, name=source.name)
        if files:
            _check_inside(builder, folder, where)
        if source.documents is not None and not hasattr(builder.config, "sample_by"):
            raise UserError(
                f"{where}: documents is {source.documents!r}, which is for .txt files, but {source.hub} has none"
            )
        for option, value in _options(source).items():
            if hasattr(builder.config, option):  # which options exist depends on the type of the data set's files
                setattr(builder.config, option, value)
        table = builder.as_streaming_dataset(split=source.split)
        return _labelled(table, source, where, longest)


@contextmanager
def said(
    where: str, called: str, files: Sequence[TextFile], longest: int, renamed: tuple[str, str] = ("", "")
) -> Iterator[None]:
    """Turn what `datasets` raises inside the block into a UserError; it names the file and the line where they are known."""
    try:
        yield
    except (UserError, CacheError):
        raise
    except Exception as error:  # damaged files raise errors of every type
        if isinstance(error, MemoryError):
            raise
        for file in files:
            _check_file(file, where, longest)
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: {called} could not be read: {text.replace(*renamed) if renamed[0] else text}") from error


def _check_file(file: TextFile, where: str, longest: int) -> None:
    """Read a file to its end, so that a bad line is named."""
    kinds = [KINDS[suffix.lstrip(".")] for suffix in Path(file.path).suffixes if suffix.lstrip(".") in KINDS]
    if kinds in (["json"], ["csv"], ["text"]):
        reader = json_file.entries if kinds == ["json"] else lines
        for _ in reader(file.path, where, longest, Place()):
            pass


def _options(source: TextSource) -> dict:
    """Options of `datasets`: a CSV's cells are read as text, NA and 007 too; .txt files are cut as the source says."""
    cells = {"converters": {source.column: str, "source": str}, "keep_default_na": False}
    return {**cells, "sample_by": DOCUMENTS[source.documents or "file"]}


def _labelled(table, source: TextSource, where: str, longest: int) -> Any:
    """The table in the columns `label`, `text` and `chat`."""
    columns = list(table.column_names or next(iter(table), {}))  # some streams know their columns only by the first row
    wanted = columns_of(source.column, columns, source.train_on)
    if not wanted:
        raise UserError(f"{where}: there is no column {source.column!r}; there are {', '.join(columns) or 'none'}")
    label = source.label or (None if "source" in columns else source.hub)
    options = {"columns": wanted, "label": label, "where": where, "longest": longest}
    if source.documents == "paragraphs":
        return table.map(label_and_paragraphs, fn_kwargs=options, remove_columns=columns, batched=True)
    options |= {"train_on": source.train_on, "called": source.hub}
    return table.map(label_and_row, fn_kwargs=options, remove_columns=columns, with_indices=True)


def label_and_row(
    row: Mapping,
    index: int,
    columns: Sequence[str],
    label: str | None,
    where: str,
    longest: int,
    train_on: str | None = None,
    called: str = "",
) -> dict[str, str | bool]:
    """A row in the columns `label`, `text` and `chat`.

    A plain function with plain arguments, because `datasets` names what it caches by a hash of both.
    """
    place = f"{where}: {named(called)}, row {index + 1}"
    text = row_of(row, train_on, place, index + 1, columns, row) or ""
    if text and size(text) > longest:
        raise UserError(f"{where}: a document is longer than {longest:,} bytes, the most that it may have; {LONGER}")
    said = str(row["source"]) if label is None else label
    return {"label": said, "text": str(text), "chat": isinstance(text, Chat)}


def label_and_paragraphs(rows: Mapping, columns: Sequence[str], label: str, where: str, longest: int) -> dict[str, list]:
    """As `label_and_row`, for many rows at a time, with a row for each paragraph; blank lines may hold spaces."""
    column = columns[0]
    texts = [part for text in rows[column] for part in paragraphs(text or "")]
    found = [label_and_row({column: text}, 0, columns, label, where, longest) for text in texts]
    return {name: [row[name] for row in found] for name in ("label", "text", "chat")}


def _check_descriptions(folder: Path, where: str) -> None:
    """Refuse a folder whose description names files outside it, before anything reads the folder."""
    for name in DESCRIPTIONS:
        file = folder / name
        if not file.is_file():
            continue
        for place in _places(_description(file, where)):
            if os.path.isabs(place) or ".." in Path(place).parts or ":" in place or place.startswith("~"):
                raise UserError(
                    f"{where}: {named(file)} names {brief(place)}, which is not in its folder; a data set reads only files "
                    "of its own folder: name others under path"
                )


def _description(file: Path, where: str) -> object:
    """The YAML of a description; in a README it is between two lines of ---."""
    try:
        with file.open("rb") as opened:
            text = opened.read(LARGEST + 1).decode("utf-8-sig")
        if len(text) > LARGEST:
            raise ValueError(f"it is larger than {LARGEST:,} bytes")
        if file.suffix == ".md":
            parts = text.lstrip().splitlines()
            end = parts.index("---", 1) if parts[:1] == ["---"] and "---" in parts[1:] else 1
            text = "\n".join(parts[1:end])
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("its YAML has aliases (*name)")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"its YAML is nested deeper than {DEEPEST} levels")
        return yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{where}: {named(file)} does not describe a data set: {said}; mend it, or remove it") from error


def _places(description: object) -> Iterator[str]:
    """The names of files and folders in a description's `configs`."""
    configs = description.get("configs") if isinstance(description, dict) else None
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict):
            yield from _texts([config.get("data_files"), config.get("data_dir")])


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _check_inside(builder, folder: Path, where: str) -> None:
    """Refuse links to files outside the folder; a snapshot in the hub's cache may link to the blobs next to it."""
    own = [os.path.realpath(folder), os.path.realpath(folder / ".." / ".." / "blobs")]
    for file in (file for group in (builder.config.data_files or {}).values() for file in group):
        real = os.path.realpath(str(file))
        if not any(os.path.commonpath([real, place]) == place for place in own):
            raise UserError(
                f"{where}: {named(str(file))} leads to {named(real)}, which is not in the data set's folder; copy it "
                "there, or name it under path"
            )
