"""Tokenises rows of text into documents, in this process or in several; the number of processes changes no token."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.errors import UserError
from distill.text.chat_tokens import Marked
from distill.text.encoding import Documents
from distill.text.pair_tokens import row_documents
from distill.text.pieces import Row, encoded, grouped
from distill.text.rows import Chat

SMALL = 16_000_000  # bytes of text; for less, one process is fast enough
AHEAD = 2  # groups of rows in flight for each process
WATCH = 1.0  # seconds between two checks that the parent process still lives
QUIET = "TOKENIZERS_PARALLELISM"  # set to false, it stops a warning of the tokenizers library about forked processes

Encoded = list[tuple[Any, list[np.ndarray | Marked]]]  # a row's label, and the tokens of each of its documents
Encode = Callable[[Iterator[Row]], Iterator[tuple[Any, list[np.ndarray | Marked]]]]

_worker: tuple[Any, Documents] | None = None  # in a worker: the tokenizer, and what cuts rows into documents


def usable_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_for(size: int | None, asked: int | None = None) -> int:
    """How many processes tokenise `size` bytes of text (None: not known): one for each core; a single one for little text,
    or where processes cannot be forked safely.

    Raises:
        UserError: several are asked for on a system that cannot fork.
    """
    forks = "fork" in multiprocessing.get_all_start_methods()
    if asked is not None:
        if asked > 1 and not forks:
            raise UserError(f"--processes is {asked}, but this system cannot fork processes; leave it out")
        return asked
    return 1 if sys.platform != "linux" or (size is not None and size < SMALL) else usable_cores()


@contextmanager
def tokenising(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], processes: int) -> Iterator[Encode]:
    """A function that turns rows into documents, while the block runs.

    Args:
        ends: the tokens that end a text. processes: how many; 1 is this process.
    """
    cut = Documents(tokenizer, ends)
    if processes == 1:
        yield lambda rows: (row for group in grouped(rows) for row in _encode(group, tokenizer, cut))
        return
    pool = _pool(tokenizer, cut, processes)
    try:
        yield lambda rows: _shared(pool, rows, AHEAD * processes)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenises was killed from outside, perhaps because memory ran out; give the same command "
            "again, or distill prepare with fewer --processes"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode(group: Sequence[Row], tokenizer, cut: Documents) -> Encoded:
    plain = [(label, text) for label, text in group if not isinstance(text, Chat)]
    texts = iter(encoded(plain, tokenizer) if plain else [])
    chats = iter(row_documents([text for _, text in group if isinstance(text, Chat)], tokenizer))
    found: Encoded = []
    for label, text in group:
        documents: list[np.ndarray | Marked] = (
            next(chats) if isinstance(text, Chat) else list(cut(np.asarray(next(texts)[1], np.uint32)))
        )
        found.append((label, documents))
    return found


def _shared(pool: ProcessPoolExecutor, rows: Iterator[Row], ahead: int) -> Iterator[tuple[Any, list[np.ndarray | Marked]]]:
    """Rows tokenised by a pool, in their order, with `ahead` groups in flight."""
    groups, waiting = grouped(rows), deque[Future]()
    try:
        for group in islice(groups, ahead):
            waiting.append(pool.submit(_work, group))
        while waiting:
            found = waiting.popleft().result()
            if (further := next(groups, None)) is not None:
                waiting.append(pool.submit(_work, further))
            yield from found
    finally:
        for future in waiting:
            future.cancel()


def _pool(tokenizer, cut: Documents, processes: int) -> ProcessPoolExecutor:
    """A pool of forked processes, which have the tokenizer from their start."""
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(tokenizer, cut, os.getpid()))
    before = os.environ.get(QUIET)
    os.environ[QUIET] = "false"  # the processes use all cores already
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of forks where there are threads; the workers use none
            pool.submit(int).result()
    finally:
        if before is None:
            del os.environ[QUIET]
        else:
            os.environ[QUIET] = before
    return pool


def _begin(tokenizer, cut: Documents, parent: int) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches workers too; their parent ends them
    _worker = tokenizer, cut
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    """End this worker once its parent has ended, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(1)


def _work(group: list[Row]) -> Encoded:
    tokenizer, cut = cast(tuple[Any, Documents], _worker)
    return _encode(group, tokenizer, cut)
