"""One stage on its way: what it is, where it stands in the training text, and what it takes."""

import time
from dataclasses import dataclass

from distill.runs.checkpoint import RunState
from distill.stages import StageEntry
from distill.stages.stage import Stage
from distill.training.trainer import Trainer


@dataclass
class StageRun:
    """A stage of a recipe while it runs.

    window: its first window of training text. began: the monotonic time at which it would have begun without
    interruptions. seq_len: tokens of a window. trainer: None where it takes no steps. step: steps taken so far.
    """

    entry: StageEntry
    stage: Stage
    window: int
    began: float
    seq_len: int
    trainer: Trainer | None = None
    step: int = 0

    @property
    def seconds(self) -> float:
        """Seconds taken, those before an interruption included."""
        return time.monotonic() - self.began

    @property
    def steps_left(self) -> range:
        """The steps to take; none where it only computes."""
        return range(self.step, self.trainer.steps if self.trainer else self.step)

    @property
    def next_window(self) -> int:
        """The first window of training text after this stage's."""
        return self.trainer.next_window if self.trainer else self.window + -(-self.entry.options.tokens // self.seq_len)

    def state(self, teacher: str, done: bool) -> RunState:
        """What a checkpoint says of it. teacher: the teacher's fingerprint. done: whether the stage is over."""
        where = {"window": self.next_window, "step": 0} if done else {"window": self.window, "step": self.step}
        seconds = 0.0 if done else self.seconds
        return RunState(self.entry.index, self.entry.name, done=done, teacher=teacher, seconds=seconds, **where)
