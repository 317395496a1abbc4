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
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from distill.errors import UserError
from distill.recipe import TextSource
from distill.text import prepared
from distill.text.encoding import Documents
from distill.text.sources import Rows, TextFile, files_of, streams
from teachers.source import cache_folder

FORMAT = "4"  # part of the key: raise it when prepared folders change
BATCH = 256  # rows tokenised at a time

Tokenised = Iterator[tuple[str, list[int]]]  # label and token ids of a document

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
) -> Path:
    """The prepared folder of some sources, made on first use.

    Args:
        separator: the token that ends each document (default: the tokenizer's end of sequence).
        limit: stop after so many tokens. where: the recipe's key, for messages. make: whether to make it if need be.

    Raises:
        NotPreparedError: it would have to be made, and shall not be.
        UserError: a file, column or token that is not there, a file that changes while it is read, or no text at all.
    """
    files = [files_of(source, f"{where}.{index}") for index, source in enumerate(sources)]
    end, before = _separator_id(tokenizer, separator, where), _stamps(files)
    target = _place(sources, files, tokenizer, end, seed, limit)
    if not target.exists() and not make:
        raise NotPreparedError(f"{where} is not prepared")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".preparing-"))
        try:
            _write(scratch, sources, files, tokenizer, end, seed, limit, where)
            if _stamps(files) != before:
                raise UserError(f"{where}: its files changed while they were read; run the same command again")
            if not target.exists():
                scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _stamps(files: Sequence[Sequence[TextFile]]) -> list[tuple[int, int, int]]:
    found = [os.stat(file.path) for group in files for file in group]
    return [(stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in found]


def _place(sources, files: Sequence[Sequence[TextFile]], tokenizer, end: int, seed: int, limit: int | None) -> Path:
    """Where the text is prepared: named by what it holds and how that is read, whatever its files' folder is."""
    read = [
        [source.model_dump(exclude={"path"}), [[file.kind, file.label, prepared.file_hash(file.path)] for file in group]]
        for source, group in zip(sources, files, strict=True)
    ]
    said = json.dumps([FORMAT, _tokenizer_hash(tokenizer), end, seed, limit, read])
    return cache_folder() / "prepared" / hashlib.sha256(said.encode()).hexdigest()[:16]


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


def _write(target: Path, sources, files, tokenizer, end: int, seed: int, limit: int | None, where: str) -> None:
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32
    reading = target / "reading"  # what `datasets` makes of the files; read once and taken away
    tokens, starts, labels, names = [], [0], [], {}
    for label, ids in _documents(sources, files, tokenizer, end, seed, where, reading):
        ids = ids if ids[-1] == end else [*ids, end]
        tokens.append(np.asarray(ids, dtype))
        labels.append(names.setdefault(label, len(names)))
        starts.append(starts[-1] + len(ids))
        if limit is not None and starts[-1] >= limit:
            break
    if not tokens:
        raise UserError(f"{where}: there is no text in {', '.join(source.path or source.hub for source in sources)}")
    shutil.rmtree(reading, ignore_errors=True)
    named = [source.model_dump(exclude_defaults=True) for source in sources]
    meta = prepared.write(
        target, np.concatenate(tokens), np.asarray(starts[:-1]), np.asarray(labels), list(names), sources=named
    )
    _log.info("prepared %s: %s tokens in %s documents", where, f"{meta['tokens']:,}", f"{meta['documents']:,}")


def _documents(sources, files, tokenizer, end: int, seed: int, where: str, reading: Path) -> Tokenised:
    """Label and token ids of each document; sources with weights in proportion, others shuffled together."""
    cut = Documents(tokenizer, [token for token in (end, tokenizer.eos_token_id) if token is not None])
    passes = [
        lambda turn, stream=stream: _tokenised(stream(turn), tokenizer, cut)
        for stream in streams(sources, files, seed, where, reading)
    ]
    if len(passes) == 1:
        return passes[0](0)
    return mixed(passes, [1.0 if source.weight is None else source.weight for source in sources], where)


def _tokenised(rows: Rows, tokenizer, cut: Documents) -> Tokenised:
    while batch := [row for _, row in zip(range(BATCH), rows, strict=False)]:
        texts = [(label, text) for label, text in batch if text.strip()]
        if not texts:
            continue
        # a document longer than what the model was made for is no mistake here: it is cut into windows
        encoded = tokenizer([text for _, text in texts], verbose=False)["input_ids"]
        yield from ((label, ids) for (label, _), row in zip(texts, encoded, strict=True) for ids in cut(row))


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
