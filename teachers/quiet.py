"""transformers kept quiet: no progress bars in a log, no warnings about what is tried."""

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
