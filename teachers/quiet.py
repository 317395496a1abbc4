"""transformers kept quiet: no progress bars in a log, no warnings about what is tried, no panics on the standard error."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_bars_in_logs() -> Iterator[None]:
    """Switch transformers' progress bars off while standard error is no terminal."""
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
    """Let transformers speak of errors alone."""
    from transformers.utils import logging

    usual = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(usual)


@contextmanager
def no_panics() -> Iterator[None]:
    """Keep what code in Rust writes where it breaks off from the standard error: the exception that follows says it too."""
    sys.stderr.flush()
    usual, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(usual, 2)
        os.close(usual)
        os.close(nowhere)
