"""Prepares text: sources, in the order that a seed fixes, are tokenised, cut into documents and written in shards.

`prepared.py` describes the shards, which NumPy maps into memory. A preparation that was stopped goes on after its last whole
shard and writes the same bytes. Whether a document begins with a token of its own is the tokenizer's convention; where a row
of text holds several documents, see `encoding.Documents`.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from distill.errors import UserError, named
from distill.recipe import LONGEST_DOCUMENT, TextSource
from distill.text import shards
from distill.text.chat_tokens import Marked
from distill.text.drawing import Source, drawn
from distill.text.files import TextFile, files_of
from distill.text.identity import Stamp, separator_id, stamps, text_name
from distill.text.progress import TextProgress
from distill.text.shard_facts import META, Meta, Place, missing, read_meta, shard_name
from distill.text.sources import Stream, streams
from distill.text.tokenising import processes_for, tokenising
from teachers.cache import CacheError, cache_folder, in_parts, is_there, writing

KIND = "prepared"  # the folder of the cache
STAMPS = "stamps.json"  # until a text is whole, the stamps of the files that it is made from
READING = "reading"  # the folder for the rows that were read from the files; removed at the end
TOKEN = 4  # bytes of text in a token, about

_log = logging.getLogger(__name__)


class NotPreparedError(UserError):
    """An error: text is not prepared, and the caller does not want it to be prepared now."""


@dataclass(frozen=True)
class Tokenising:
    """Options of preparation. processes: how many tokenise; None chooses by the cores and the size of the text. console: for
    a live line of progress."""

    processes: int | None = None
    console: Console | None = None


def prepare(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    separator: str | None,
    seed: int,
    limit: int | None,
    where: str,
    make: bool = True,
    longest: int = LONGEST_DOCUMENT,
    how: Tokenising | None = None,
) -> Path:
    """The prepared folder of some sources, made on first use; a second process waits while the first one makes it.

    Args:
        separator: the token that ends each document (default: the tokenizer's end of sequence).
        limit: stop after this number of tokens. where: the recipe's key, for messages. make: whether to prepare the text if
            it is not prepared. longest: the most bytes of UTF-8 that a document may have. how: processes and progress.

    Raises:
        NotPreparedError: the text is not prepared, and `make` is False.
        UserError: a file, column or token does not exist; a file is damaged or changes while it is read; a document is too
            long; there is no text at all; or the cache cannot be used.
    """
    files = [files_of(source, f"{where}.{index}") for index, source in enumerate(sources)]
    end, before = separator_id(tokenizer, separator, where), stamps(files, where)
    asked = _Asked(sources, files, tokenizer, end, seed, limit, where, longest, how or Tokenising())

    def write(folder: Path) -> None:
        with writing(folder.parent):
            _begin(folder, before)
            _write(folder, asked)
            if stamps(files, where) != before:
                _begin(folder, None)
                raise UserError(f"{where}: its files changed while they were read; run the same command again")
            (folder / STAMPS).unlink()

    try:
        name = text_name(sources, files, tokenizer, [end, seed, limit, shards.SIZE], where)
        if not make and not is_there(cache_folder() / KIND / name):
            raise NotPreparedError(f"{where} is not prepared")
        return in_parts(KIND, name, write, where, _whole)
    except CacheError as error:
        raise UserError(f"{where} could not be prepared: {error}") from error


@dataclass(frozen=True)
class _Asked:
    """A text to prepare. end: the token that ends a document."""

    sources: Sequence[TextSource]
    files: Sequence[Sequence[TextFile]]
    tokenizer: PreTrainedTokenizerBase
    end: int
    seed: int
    limit: int | None
    where: str
    longest: int
    how: Tokenising

    @property
    def weights(self) -> list[float] | None:
        """The weights of the sources, where they are mixed."""
        if len(self.sources) == 1 or all(source.weight is None for source in self.sources):
            return None
        return [1.0 if source.weight is None else source.weight for source in self.sources]

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text."""
        return [token for token in (self.end, self.tokenizer.eos_token_id) if token is not None]


def _begin(folder: Path, stamped: list[Stamp] | None) -> None:
    """Remove what an earlier attempt made from files that have changed since, and write the stamps of today's files."""
    file, said = folder / STAMPS, json.dumps(stamped)
    with suppress(FileNotFoundError):
        if file.read_text(encoding="utf-8") != said:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if stamped is not None:
        file.write_text(said, encoding="utf-8")


def _whole(folder: Path) -> bool:
    """Whether a prepared folder has all its shards; other damage is reported when a shard is read."""
    try:
        return not missing(folder, read_meta(folder))
    except UserError:
        return True


def _write(folder: Path, asked: _Asked) -> None:
    """Write the shards that a folder lacks, and then the `meta.json` that lists them all."""
    known = read_meta(folder) if (folder / META).is_file() else None
    dtype = np.uint16 if max(asked.tokenizer.get_vocab().values()) < 2**16 else np.uint32
    writer = shards.Writer(folder, dtype, shards.SIZE)
    try:
        _write_shards(writer, folder, asked, known)
        if not writer.documents:
            said = ", ".join(named(source.path or source.hub) for source in asked.sources)
            raise UserError(f"{asked.where}: there is no text in {said}")
        meta = writer.finish(known, sources=[source.model_dump(exclude_defaults=True) for source in asked.sources])
    except BaseException:
        writer.give_up()
        if not writer.shards:  # a later attempt has nothing to go on from
            shutil.rmtree(folder / READING, ignore_errors=True)
        raise
    shutil.rmtree(folder / READING, ignore_errors=True)
    _log.info("prepared %s: %s tokens in %s documents", asked.where, f"{meta.tokens:,}", f"{meta.documents:,}")


def _write_shards(writer: shards.Writer, folder: Path, asked: _Asked, known: Meta | None) -> None:
    """Write every shard that is missing, each from where the one before it ended."""
    last = len(known.shards) if known else None
    places: list[Place] = _known(writer, [], last)
    if _over(writer, asked, last):
        return
    made = streams(asked.sources, asked.files, asked.seed, asked.where, folder / READING, asked.longest)
    processes = processes_for(_size(made, asked.limit), asked.how.processes)
    progress = TextProgress(asked.where, writer.tokens, asked.limit, asked.how.console)
    with tokenising(asked.tokenizer, asked.ends, processes) as encode, progress.shown():
        while not _over(writer, asked, last):
            sources = [
                Source(stream, encode, place) for stream, place in zip(made, places or [Place()] * len(made), strict=True)
            ]
            if not _draw(writer, sources, asked, progress, folder, last):
                return
            places = _known(writer, [source.place for source in sources], last)


def _draw(
    writer: shards.Writer, sources: list[Source], asked: _Asked, progress: TextProgress, folder: Path, last: int | None
) -> bool:
    """Write shards until the next one exists already, or the text ends. Returns whether the text may go on after that."""
    for label, ids in drawn(sources, asked.weights, asked.where):
        _add(writer, label, ids, asked.end)
        progress.update(writer.tokens, writer.documents, _share(sources))
        if writer.full:
            writer.close([source.place for source in sources])
            if _over(writer, asked, last) or (folder / shard_name(writer.shards)).is_dir():
                return True
        elif _over(writer, asked, last):
            break
    if writer.open:
        writer.close([source.place for source in sources])
    return False


def _add(writer: shards.Writer, label: str, document: np.ndarray | Marked, end: int) -> None:
    """Write a document with the token that ends it, which is trained on where it ends a completion (`Marked.unended`)."""
    ids = document.ids if isinstance(document, Marked) else document
    parts = [ids] if ids[-1] == end else [ids, [end]]
    if isinstance(document, Marked):
        trained = document.trained if len(parts) == 1 else np.append(document.trained, document.unended)
        writer.add(label, *parts, trained=trained, row=document.row)
    else:
        writer.add(label, *parts)


def _known(writer: shards.Writer, places: list[Place], last: int | None) -> list[Place]:
    """Take over the next shards that exist. Returns where the sources go on after them."""
    while writer.shards != last and (found := writer.known()) is not None:
        places = found
    return places


def _over(writer: shards.Writer, asked: _Asked, last: int | None) -> bool:
    """Whether the text is complete."""
    return writer.shards == last or (asked.limit is not None and writer.tokens >= asked.limit)


def _size(made: Sequence[Stream], limit: int | None) -> int | None:
    """About how many bytes of text will be tokenised; None where that is not known."""
    known = [stream.size for stream in made]
    sizes = [sum(cast(list[int], known))] if None not in known else []
    return min(sizes + ([TOKEN * limit] if limit is not None else []), default=None)


def _share(sources: Sequence[Source]) -> float | None:
    """The share of its rows that was read, of the source that has the largest part left; None where it is not known."""
    shares = [source.share for source in sources]
    return None if None in shares else min(cast(list[float], shares))
