"""Context managers that silence libraries: progress bars in logs, transformers' warnings, panics of Rust code on stderr."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_bars_in_logs() -> Iterator[None]:
    """Inside the block, transformers' progress bars are off if standard error is no terminal."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextmanager
def no_warnings() -> Iterator[None]:
    """Inside the block, transformers logs only errors."""
    from transformers.utils import logging

    usual = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(usual)


@contextmanager
def no_panics() -> Iterator[None]:
    """Inside the block, nothing is written to standard error: the exception after a Rust panic has the same message."""
    sys.stderr.flush()
    usual, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(usual, 2)
        os.close(usual)
        os.close(nowhere)
