"""Text once into tokens: sources read by `datasets`, shuffled, tokenised, and written as arrays that numpy maps.

A prepared folder holds `tokens.npy` (all documents one after the other, each ended by the separator), `starts.npy` (where
each document begins), `labels.npy` (its source) and `meta.json`.
"""

import glob
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from distill.errors import UserError
from distill.recipe import Text, shipped_folder
from teachers.gguf import cache_folder

FORMAT = "2"  # part of the key: raise it when prepared folders change
BATCH = 256  # documents tokenised at a time
SHIPPED = "shipped:"

_log = logging.getLogger(__name__)


def prepare(sources: Sequence[Text], tokenizer, *, separator: str | None, seed: int, limit: int | None, where: str) -> Path:
    """The prepared folder of some sources, made on first use.

    Args:
        separator: the token that ends each document (default: the tokenizer's end of sequence).
        limit: stop after so many tokens. where: the recipe's key, for messages.

    Raises:
        UserError: a file, column or token that is not there, or no text at all.
    """
    files = [_files(source, f"{where}.{index}") for index, source in enumerate(sources)]
    end = _separator_id(tokenizer, separator, where)
    key = hashlib.sha256(f"{FORMAT} {_tokenizer_hash(tokenizer)} {end} {seed} {limit}".encode())
    for source, names in zip(sources, files, strict=True):
        key.update(source.model_dump_json(exclude={"path"}).encode())
        for name in names:
            key.update(_file_hash(name))
    target = cache_folder() / "prepared" / key.hexdigest()[:16]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".preparing-"))
        try:
            _write(scratch, sources, files, tokenizer, end, seed, limit, where)
            if not target.exists():
                scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _files(source: Text, where: str) -> list[str]:
    if source.path is None:
        return []
    pattern = source.path
    if pattern.startswith(SHIPPED):
        pattern = str(shipped_folder() / "text" / pattern.removeprefix(SHIPPED))
    names = sorted(glob.glob(os.path.expanduser(pattern)))
    if not names:
        raise UserError(f"{where}: no file matches {source.path!r} (looked from {Path.cwd()})")
    return names


def _separator_id(tokenizer, separator: str | None, where: str) -> int:
    token = tokenizer.eos_token if separator is None else separator
    if token is None or token not in tokenizer.get_vocab():
        raise UserError(
            f"data.separator: the tokenizer has no token {token!r} to end the documents of {where} with; name one of its own"
        )
    return tokenizer.convert_tokens_to_ids(token)


def _tokenizer_hash(tokenizer) -> str:
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def _file_hash(name: str) -> bytes:
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _write(target: Path, sources, files, tokenizer, end: int, seed: int, limit: int | None, where: str) -> None:
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    tokens, starts, labels, names = [], [0], [], []
    for label, ids in _documents(sources, files, tokenizer, seed, where):
        if label not in names:
            names.append(label)
        ids = ids if ids and ids[-1] == end else [*ids, end]
        tokens.append(np.asarray(ids, dtype))
        labels.append(names.index(label))
        starts.append(starts[-1] + len(ids))
        if limit is not None and starts[-1] >= limit:
            break
    if not tokens:
        raise UserError(f"{where}: there is no text in {', '.join(source.path or source.hub for source in sources)}")
    joined = np.concatenate(tokens)
    np.save(target / "tokens.npy", joined)
    np.save(target / "starts.npy", np.asarray(starts[:-1], np.int64))
    np.save(target / "labels.npy", np.asarray(labels, np.int16))
    meta = {
        "tokens": len(joined),
        "documents": len(labels),
        "labels": names,
        "sha256": hashlib.sha256(joined.tobytes()).hexdigest(),
        "sources": [source.model_dump(exclude_defaults=True) for source in sources],
    }
    (target / "meta.json").write_text(json.dumps(meta, indent=1))
    _log.info("prepared %s: %s tokens in %s documents", where, f"{len(joined):,}", f"{len(labels):,}")


def _documents(sources, files, tokenizer, seed: int, where: str) -> Iterator[tuple[str, list[int]]]:
    """Label and token ids of each document, in shuffled order."""
    rows = _shuffled(sources, files, seed, where)
    while batch := [row for _, row in zip(range(BATCH), rows, strict=False)]:
        encoded = tokenizer([text for _, text in batch])["input_ids"]
        for (label, _), ids in zip(batch, encoded, strict=True):
            if ids:
                yield label, list(ids)


def _shuffled(sources, files, seed: int, where: str) -> Iterator[tuple[str, str]]:
    import datasets

    datasets.disable_progress_bars()
    tables, weights = [], []
    for index, (source, names) in enumerate(zip(sources, files, strict=True)):
        parts = [_table(source, name, f"{where}.{index}") for name in names or [None]]
        tables.append(datasets.concatenate_datasets(parts))
        weights.append(source.weight)
    streaming = any(isinstance(table, datasets.IterableDataset) for table in tables)
    if streaming:
        tables = [t if isinstance(t, datasets.IterableDataset) else t.to_iterable_dataset() for t in tables]
    if any(weight is not None for weight in weights):
        shares = np.asarray([1.0 if weight is None else weight for weight in weights])
        tables = [table.shuffle(seed=seed) for table in tables]
        mixed = datasets.interleave_datasets(
            tables, (shares / shares.sum()).tolist(), seed=seed, stopping_strategy="all_exhausted"
        )
    else:
        mixed = datasets.concatenate_datasets(tables).shuffle(seed=seed)
    for row in mixed:
        yield row["label"], row["text"]


def _table(source: Text, name: str | None, where: str):
    """One file's or the hub's rows, in the two columns `label` and `text` whatever the source calls them."""
    import datasets

    try:
        if name is None:
            table = datasets.load_dataset(source.hub, source.name, split=source.split, streaming=True)
        else:
            table = datasets.load_dataset(_format(name, where), data_files=name, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"{where}: {name or source.hub} could not be read: {error}") from error
    columns = table.column_names
    if columns is not None and source.column not in columns:
        raise UserError(f"{where}: there is no column {source.column!r}; there are {', '.join(columns)}")
    own = columns is not None and "source" in columns and source.label is None
    label = source.label or (source.hub if name is None else _label(name))
    return table.map(
        lambda row: {"label": row["source"] if own else label, "text": row[source.column] or ""}, remove_columns=columns
    )


def _format(name: str, where: str) -> str:
    kinds = {"jsonl": "json", "json": "json", "parquet": "parquet", "txt": "text", "csv": "csv"}
    found = {kinds[suffix.lstrip(".")] for suffix in Path(name).suffixes if suffix.lstrip(".") in kinds}
    if len(found) != 1:
        raise UserError(f"{where}: {name} is no text this can read; it reads {', '.join(kinds)}, plain or .xz, .gz, .zst")
    return found.pop()


def _label(name: str) -> str:
    """What a file's text is called: its name up to the first dot, without a shard's number."""
    return re.sub(r"-\d+$", "", Path(name).name.split(".")[0])
