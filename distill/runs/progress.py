"""Progress of a run on the console: one live line for each stage on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 15.0  # time between two plain lines


@dataclass
class StepReport:
    """The results of one optimizer step: losses by name, their mean, the gradient norm, the rate, tokens and seconds."""

    step: int
    tokens: int
    loss: float
    losses: dict[str, float]
    gradient_norm: float
    rate: float
    seconds: float


def live_bar(console: Console, title: str, said: str) -> Progress:
    """A live line with a title, a bar, a text, and the time taken and left. It is shown on a terminal only.

    Args:
        title, said: the title and the text, as templates of rich's TextColumn.
    """
    return Progress(
        TextColumn(title),
        BarColumn(bar_width=28),
        TextColumn(said),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


class StageProgress:
    """Shows the progress of one stage's steps. `update` takes the report of each step."""

    def __init__(self, console: Console, title: str, steps: int, start: int) -> None:
        self.console, self.title, self.steps, self.start = console, title, steps, start
        self._printed = self._began = time.monotonic()
        self._tokens = 0
        said = "{task.completed}/{task.total} steps  loss {task.fields[loss]}  {task.fields[speed]} tokens/s"
        self._bar = live_bar(console, "  {task.description:<10}", said)
        self._task = self._bar.add_task(title, total=steps, completed=start, loss="-", speed="-")

    @contextmanager
    def shown(self) -> Iterator["StageProgress"]:
        """Show the line while the block runs."""
        with self._bar:
            yield self

    def update(self, report: StepReport) -> None:
        """Show one step's report."""
        now = time.monotonic()
        self._tokens += report.tokens
        speed = self._tokens / max(now - self._began, 1e-9)
        if self.console.is_terminal:
            self._bar.update(self._task, completed=report.step, loss=f"{report.loss:.4f}", speed=f"{speed:,.0f}")
        elif now - self._printed > PLAIN_SECONDS or report.step == self.steps:
            self._printed = now
            left = (self.steps - report.step) * (now - self._began) / max(report.step - self.start, 1)
            self.console.print(
                f"  {self.title} {report.step}/{self.steps}  loss {report.loss:.4f}  {speed:,.0f} tokens/s  {left:.0f} s"
            )
