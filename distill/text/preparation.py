"""Text once into tokens: sources in the order that a seed fixes, tokenised, cut into documents, and written as arrays that
numpy maps (`prepared.py` says which).

Whether a document begins with a token of its own is the tokenizer's convention; where a row of text holds several, see
`encoding.Documents`.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from distill.console import Ticker
from distill.errors import UserError, named
from distill.recipe import LONGEST_DOCUMENT, TextSource
from distill.text import prepared
from distill.text.encoding import Documents
from distill.text.files import TextFile, files_of
from distill.text.pieces import tokenised
from distill.text.sources import streams
from teachers.cache import CacheError, cache_folder, is_there, once, writing

FORMAT = "5"  # part of the key: raise it when prepared folders change
KIND = "prepared"  # the folder of the cache

Tokenised = Iterator[tuple[str, Sequence[int]]]  # label and token ids of a document

_log = logging.getLogger(__name__)


class NotPreparedError(UserError):
    """Text that was asked for as far as it is prepared, and is not."""


def prepare(
    sources: Sequence[TextSource],
    tokenizer,
    *,
    separator: str | None,
    seed: int,
    limit: int | None,
    where: str,
    make: bool = True,
    longest: int = LONGEST_DOCUMENT,
) -> Path:
    """The prepared folder of some sources, made on first use; a process that comes while another makes it waits.

    Args:
        separator: the token that ends each document (default: the tokenizer's end of sequence).
        limit: stop after so many tokens. where: the recipe's key, for messages. make: whether to make it if need be.
        longest: bytes of UTF-8 that a document may have.

    Raises:
        NotPreparedError: it would have to be made, and shall not be.
        UserError: a file, column or token that is not there, a file that is damaged or changes while it is read, a document
            that is too long, no text at all, or a cache that cannot be used.
    """
    files = [files_of(source, f"{where}.{index}") for index, source in enumerate(sources)]
    end, before = _separator_id(tokenizer, separator, where), _stamps(files, where)

    def write(folder: Path) -> None:
        with writing(folder.parent):
            _write(folder, sources, files, tokenizer, end, seed, limit, where, longest)
        if _stamps(files, where) != before:
            raise UserError(f"{where}: its files changed while they were read; run the same command again")

    try:
        name = _name(sources, files, tokenizer, end, seed, limit, where)
        if not make and not is_there(cache_folder() / KIND / name):
            raise NotPreparedError(f"{where} is not prepared")
        return once(KIND, name, write, where)
    except CacheError as error:
        raise UserError(f"{where} could not be prepared: {error}") from error


def _stamps(files: Sequence[Sequence[TextFile]], where: str) -> list[tuple[int, int, int]]:
    found = []
    for file in (file for group in files for file in group):
        try:
            stat = os.stat(file.path)
        except OSError as error:
            raise UserError(f"{where}: {named(file.path)} cannot be read any more: {error.strerror}") from error
        found.append((stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return found


def _name(
    sources, files: Sequence[Sequence[TextFile]], tokenizer, end: int, seed: int, limit: int | None, where: str
) -> str:
    """What the prepared text is called: by what it holds and how that is read, whatever its files' folder is."""
    read = []
    for source, group in zip(sources, files, strict=True):
        try:
            hashed = [[file.kind, file.label, prepared.file_hash(file.path)] for file in group]
        except OSError as error:
            raise UserError(f"{where}: {named(error.filename or source.path)} cannot be read: {error.strerror}") from error
        read.append([source.model_dump(exclude={"path"}), hashed])
    said = json.dumps([FORMAT, _tokenizer_hash(tokenizer), end, seed, limit, read])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _separator_id(tokenizer, separator: str | None, where: str) -> int:
    token = tokenizer.eos_token if separator is None else separator
    if token is None or token not in tokenizer.get_vocab():
        raise UserError(
            f"data.separator: the tokenizer has no token {token!r} to end the documents of {where} with; name one of its own"
        )
    return tokenizer.convert_tokens_to_ids(token)


def _tokenizer_hash(tokenizer) -> str:
    """A hash of the vocabulary and of how text is split, begun and cut: two tokenizers may differ in a BOS alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer("A b  c\n\nd 12")["input_ids"])
    said = [sorted(tokenizer.get_vocab().items()), rules, tokenizer.bos_token, tokenizer.eos_token]
    said.append(getattr(tokenizer, "chat_template", None))
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _write(
    target: Path, sources, files, tokenizer, end: int, seed: int, limit: int | None, where: str, longest: int
) -> None:
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32
    reading = target / "reading"  # what is read of the files; read once and taken away
    writer = prepared.Writer(target, dtype)
    ticker = Ticker(lambda: f"{where}: {writer.tokens:,} tokens of {writer.documents:,} documents prepared")
    for label, ids in _documents(sources, files, tokenizer, end, seed, where, reading, longest):
        writer.add(label, *([ids] if ids[-1] == end else [ids, [end]]))
        ticker.tick()
        if limit is not None and writer.tokens >= limit:
            break
    if not writer.documents:
        raise UserError(f"{where}: there is no text in {', '.join(named(source.path or source.hub) for source in sources)}")
    shutil.rmtree(reading, ignore_errors=True)
    meta = writer.finish(sources=[source.model_dump(exclude_defaults=True) for source in sources])
    _log.info("prepared %s: %s tokens in %s documents", where, f"{meta['tokens']:,}", f"{meta['documents']:,}")


def _documents(sources, files, tokenizer, end: int, seed: int, where: str, reading: Path, longest: int) -> Tokenised:
    """Label and token ids of each document; sources with weights in proportion, others shuffled together."""
    cut = Documents(tokenizer, [token for token in (end, tokenizer.eos_token_id) if token is not None])

    def documents(rows: Iterator[tuple[str, str]]) -> Tokenised:
        yield from ((label, document) for label, ids in tokenised(rows, tokenizer) for document in cut(ids))

    passes = [
        lambda turn, stream=stream: documents(stream(turn))
        for stream in streams(sources, files, seed, where, reading, longest)
    ]
    if len(passes) == 1:
        return passes[0](0)
    return mixed(passes, [1.0 if source.weight is None else source.weight for source in sources], where)


def mixed(passes: Sequence[Callable[[int], Tokenised]], weights: Sequence[float], where: str) -> Tokenised:
    """Tokenised of several sources, the tokens of each always as near to their share as whole documents allow.

    Args:
        passes: for each source, its documents in its first pass (0), second pass ...

    A source that ends begins again in another order, until each has ended once. No chance is involved, so any part of the
    result is the same whenever it is made again.

    Raises:
        UserError: a source has no text.
    """
    turns, taken = [0] * len(passes), [0] * len(passes)
    running = [documents(0) for documents in passes]
    while True:
        k = min(range(len(passes)), key=lambda index: taken[index] / weights[index])
        document = next(running[k], None)
        if document is None:
            if not taken[k]:
                raise UserError(f"{where}.{k}: there is no text in this source")
            turns[k] += 1
            if all(turns):
                return
            running[k] = passes[k](turns[k])
            continue
        taken[k] += len(document[1])
        yield document
