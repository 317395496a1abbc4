"""Stopping early, on a signal or a time limit. The run saves its state first."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from distill.ranges import MINUTES


@dataclass
class Stopper:
    """Tells a run to stop after the current step, because a signal came or the time limit is reached."""

    deadline: float = math.inf
    reason: str | None = field(default=None, init=False)

    def due(self) -> str | None:
        """The reason to stop now, or None."""
        return self.reason or ("the time limit is reached" if time.monotonic() > self.deadline else None)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record SIGINT and SIGTERM instead of exiting while the block runs; a second SIGINT interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number, frame):
            if self.reason is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.reason = "interrupted" if number == signal.SIGINT else "asked to terminate"

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def deadline(minutes: float | None) -> float:
    """The monotonic time in `minutes` minutes; infinity for None.

    Raises:
        UserError: the number is out of the range `MINUTES`.
    """
    MINUTES.check(minutes, "--stop-after")
    return math.inf if minutes is None else time.monotonic() + 60 * minutes
