"""Where text for people goes: a terminal with its colours, or plain lines wide enough for tables anywhere else."""

import os
import sys
import time
from collections.abc import Callable

from rich.console import Console

TICKS = 15.0  # seconds between two lines of what takes long
PLAIN_WIDTH = 140  # characters of a line where there is no terminal to ask


def new_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console on the standard output or error; `quiet` prints nothing."""
    console = Console(stderr=stderr, quiet=quiet)
    plain = not console.is_terminal and "COLUMNS" not in os.environ
    return Console(stderr=stderr, quiet=quiet, width=PLAIN_WIDTH) if plain else console


class Ticker:
    """Says on the standard error how far something is that takes long; nothing of what is done in seconds."""

    def __init__(self, said: Callable[[], str]) -> None:
        self._said, self._next = said, time.monotonic() + TICKS

    def tick(self) -> None:
        """Go on; says a line now and then."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + TICKS
            print(self._said(), file=sys.stderr, flush=True)
