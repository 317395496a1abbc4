"""The progress of preparing text: a live line on a terminal, a plain line now and then elsewhere, none for short work."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from distill.console import TICKS, duration

LIVE = 0.2  # seconds between two changes of a live line


class TextProgress:
    """Shows how many tokens are prepared, how many a second, and about how much time is left.

    where: the recipe's key. begun: tokens that an earlier attempt prepared. limit: tokens at which preparation ends; None
    where the whole text is prepared. console: for a live line; without one, or where it is no terminal, lines go to standard
    error.
    """

    def __init__(self, where: str, begun: int, limit: int | None, console: Console | None) -> None:
        self._where, self._begun, self._limit = where, begun, limit
        self._began = time.monotonic()
        self._live = console is not None and console.is_terminal
        self._next = self._began + (0.0 if self._live else TICKS)
        columns = [TextColumn("  {task.description}"), BarColumn(bar_width=28), TextColumn("{task.fields[said]}")]
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console, disable=not self._live, transient=True)
        self._task = self._bar.add_task(where, total=1.0, said="")

    @contextmanager
    def shown(self) -> Iterator["TextProgress"]:
        """Show the progress while the block runs."""
        with self._bar:
            yield self

    def update(self, tokens: int, documents: int, share: float | None) -> None:
        """Report progress. share: the share of rows that was read, where their number is known."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (LIVE if self._live else TICKS)
        said, done = self.line(tokens, documents, share, now - self._began)
        if self._live:
            self._bar.update(self._task, completed=done, said=said)
        else:
            print(f"{self._where}: {said}", file=sys.stderr, flush=True)

    def line(self, tokens: int, documents: int, share: float | None, seconds: float) -> tuple[str, float]:
        """The text to show after `seconds`, and the share of the work that is done."""
        rate = (tokens - self._begun) / max(seconds, 1e-9)
        done = max(share or 0.0, tokens / self._limit if self._limit else 0.0)
        left = f", {duration(tokens * (1 / done - 1) / rate)} left" if 0 < done <= 1 and rate > 0 else ""
        return f"{tokens:,} tokens of {documents:,} documents prepared, {rate:,.0f} tokens/s{left}", min(done, 1.0)
