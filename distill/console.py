"""Where text for people goes: a terminal with its colours, or plain lines wide enough for tables anywhere else.

Every name in it is shown as it is: square brackets are no markup, colons no emoji, and what a terminal would act on stands
there as its number. What stands out is said with `bold` and `warning`.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from distill.errors import printable

TICKS = 15.0  # seconds between two lines of what takes long
PLAIN_WIDTH = 140  # characters of a line where there is no terminal to ask


class PlainConsole(Console):
    """A console that shows text and does nothing else with it."""

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
    """Text that stands out."""
    return Text(printable(text), style)


def duration(seconds: float) -> str:
    """So many seconds in the unit that fits them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
