"""The console for human-readable output: a coloured terminal, or plain wide lines when the output is redirected.

Text is shown unchanged: square brackets are not markup, and colons are not emoji. Control characters, on which a terminal
would act, are shown as escapes. `bold` makes text stand out.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from distill.errors import printable

TICKS = 15.0  # seconds between two progress lines
PLAIN_WIDTH = 140  # characters of a line if there is no terminal


class PlainConsole(Console):
    """A console that interprets neither markup nor emoji."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # every str that is printed comes through here, in tables too
        return super().render_str(printable(text), **{**options, "markup": False, "emoji": False})


def new_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console on the standard output or error; `quiet` prints nothing."""
    console = PlainConsole(stderr=stderr, quiet=quiet)
    plain = not console.is_terminal and "COLUMNS" not in os.environ
    return PlainConsole(stderr=stderr, quiet=quiet, width=PLAIN_WIDTH) if plain else console


def bold(text: str, style: str = "bold") -> Text:
    """Text in bold, or in another style."""
    return Text(printable(text), style)


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Ticker:
    """Progress lines on the standard error, every TICKS seconds; quick work prints none."""

    def __init__(self, said: Callable[[], str]) -> None:
        self._said, self._next = said, time.monotonic() + TICKS

    def tick(self) -> None:
        """Print a line if the last one is TICKS seconds ago."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + TICKS
            print(self._said(), file=sys.stderr, flush=True)
