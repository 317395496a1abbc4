"""transformers kept quiet: no progress bars in a log."""

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
