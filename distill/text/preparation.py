"""Text once into tokens: sources in the order that a seed fixes, tokenised, and written as arrays that numpy maps.

A prepared folder holds `tokens.npy` (all documents one after the other, each ended by the separator), `starts.npy` (where
each document begins), `labels.npy` (its source) and `meta.json`. Whether a document begins with a token of its own is the
tokenizer's convention.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from distill.errors import UserError
from distill.recipe import TextSource
from distill.text.sources import Rows, files_of, streams
from teachers.source import cache_folder

FORMAT = "3"  # part of the key: raise it when prepared folders change
BATCH = 256  # documents tokenised at a time

Documents = Iterator[tuple[str, list[int]]]  # label and token ids

_log = logging.getLogger(__name__)


def prepare(
    sources: Sequence[TextSource], tokenizer, *, separator: str | None, seed: int, limit: int | None, where: str
) -> Path:
    """The prepared folder of some sources, made on first use.

    Args:
        separator: the token that ends each document (default: the tokenizer's end of sequence).
        limit: stop after so many tokens. where: the recipe's key, for messages.

    Raises:
        UserError: a file, column or token that is not there, or no text at all.
    """
    files = [files_of(source, f"{where}.{index}") for index, source in enumerate(sources)]
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


def _separator_id(tokenizer, separator: str | None, where: str) -> int:
    token = tokenizer.eos_token if separator is None else separator
    if token is None or token not in tokenizer.get_vocab():
        raise UserError(
            f"data.separator: the tokenizer has no token {token!r} to end the documents of {where} with; name one of its own"
        )
    return tokenizer.convert_tokens_to_ids(token)


def _tokenizer_hash(tokenizer) -> str:
    """A hash of the vocabulary and of how text is split and begun: two tokenizers may differ in a BOS alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer("A b  c\n\nd 12")["input_ids"])
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{vocabulary} {rules}".encode()).hexdigest()


def _file_hash(name: str) -> bytes:
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _write(target: Path, sources, files, tokenizer, end: int, seed: int, limit: int | None, where: str) -> None:
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32
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


def _documents(sources, files, tokenizer, seed: int, where: str) -> Documents:
    """Label and token ids of each document; sources with weights in proportion, others shuffled together."""
    passes = [
        lambda turn, stream=stream: _tokenised(stream(turn), tokenizer) for stream in streams(sources, files, seed, where)
    ]
    if len(passes) == 1:
        return passes[0](0)
    return mixed(passes, [1.0 if source.weight is None else source.weight for source in sources], where)


def _tokenised(rows: Rows, tokenizer) -> Documents:
    while batch := [row for _, row in zip(range(BATCH), rows, strict=False)]:
        texts = [(label, text) for label, text in batch if text]
        if not texts:
            continue
        # a document longer than what the model was made for is no mistake here: it is cut into windows
        encoded = tokenizer([text for _, text in texts], verbose=False)["input_ids"]
        yield from ((label, list(ids)) for (label, _), ids in zip(texts, encoded, strict=True) if ids)


def mixed(passes: Sequence[Callable[[int], Documents]], weights: Sequence[float], where: str) -> Documents:
    """Documents of several sources, the tokens of each always as near to their share as whole documents allow.

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
