"""The name of a prepared text: a hash of the files' content and of how it is read; the files' folder does not matter."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

from transformers import PreTrainedTokenizerBase

from distill.disk import file_hash
from distill.errors import UserError, named
from distill.recipe import TextSource
from distill.text.files import TextFile
from teachers.cache import cache_folder

FORMAT = "6"  # part of the key: raise it when prepared folders change
LARGE = 64 << 20  # bytes; the hash of a file of this size or more is remembered
Stamp = tuple[int, int, int]  # of a file: size, time of modification, inode number


def stamps(files: Sequence[Sequence[TextFile]], where: str) -> list[Stamp]:
    """The stamp of each file, by which a later change is noticed.

    Raises:
        UserError: a file no longer exists.
    """
    found = []
    for file in (file for group in files for file in group):
        try:
            found.append(_stamp(os.stat(file.path)))
        except OSError as error:
            raise UserError(f"{where}: {named(file.path)} cannot be read any more: {error.strerror}") from error
    return found


def text_name(
    sources: Sequence[TextSource],
    files: Sequence[Sequence[TextFile]],
    tokenizer: PreTrainedTokenizerBase,
    options: list,
    where: str,
) -> str:
    """The name of a prepared folder. options: further values that it depends on.

    Raises:
        UserError: a file cannot be read.
    """
    read = []
    for source, group in zip(sources, files, strict=True):
        try:
            hashed = [[file.kind, file.label, _known_hash(file.path)] for file in group]
        except OSError as error:
            raise UserError(f"{where}: {named(error.filename or source.path)} cannot be read: {error.strerror}") from error
        said = source.model_dump(exclude={"path"})
        if said["train_on"] is None:  # text that was prepared before this key existed keeps its name
            del said["train_on"]
        read.append([said, hashed])
    whole = json.dumps([FORMAT, _tokenizer_hash(tokenizer), options, read])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def separator_id(tokenizer: PreTrainedTokenizerBase, separator: str | None, where: str) -> int:
    """The token that ends a document.

    Raises:
        UserError: the tokenizer has no such token.
    """
    token = tokenizer.eos_token if separator is None else separator
    if token is None or token not in tokenizer.get_vocab():
        raise UserError(
            f"data.separator: the tokenizer has no token {token!r} to end the documents of {where} with; name one of its own"
        )
    return cast(int, tokenizer.convert_tokens_to_ids(token))


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_size, found.st_mtime_ns, found.st_ino


def _known_hash(path: str) -> str:
    """The hash of a file; for a large file that has not changed, the hash that the cache remembers."""
    stat = os.stat(path)
    if stat.st_size < LARGE:
        return file_hash(path)
    key = hashlib.sha256(json.dumps([os.path.abspath(path), *_stamp(stat), stat.st_ctime_ns]).encode()).hexdigest()
    memory = cache_folder() / "hashes" / key
    with suppress(OSError, ValueError):
        if len(bytes.fromhex(known := memory.read_text())) == 32:
            return known
    found = file_hash(path)
    with suppress(OSError):  # then it is computed again next time
        memory.parent.mkdir(parents=True, exist_ok=True)
        scratch = memory.with_name(f"{key}.{os.getpid()}~")
        scratch.write_text(found)
        scratch.replace(memory)
    return found


def _tokenizer_hash(tokenizer) -> str:
    """A hash of the vocabulary and of how text is split and framed: two tokenizers may differ in the BOS alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer("A b  c\n\nd 12")["input_ids"])
    said = [sorted(tokenizer.get_vocab().items()), rules, tokenizer.bos_token, tokenizer.eos_token]
    said.append(getattr(tokenizer, "chat_template", None))
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
