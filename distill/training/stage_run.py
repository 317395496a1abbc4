"""The state of one running stage: its position in the training text, its steps, and its trainer."""

import time
from dataclasses import dataclass, field
from typing import Any

from distill.runs.checkpoint import RunState
from distill.stages import StageEntry
from distill.stages.stage import Stage
from distill.text.windows import Windows
from distill.training.sharding import Sharding
from distill.training.trainer import Trainer


@dataclass
class StageRun:
    """A stage of a recipe while it runs.

    text: its training text in windows. window: the first window it reads. next_window: the first window after it.
    others: the next windows of other texts and lengths, by their key (`Positions`). began: the monotonic time at which it
    would have begun without interruptions. trainer: None if it takes no steps, and after the last step. step: steps taken
    so far. steps: all steps. changed: names of tensors outside the mixers that its steps change. sharding: the divided
    student, if processes divide it. found: its changes to the student's layout, for evaluations.json. measured: the stage's
    own measurements after its last step.
    """

    entry: StageEntry
    stage: Stage
    window: int
    next_window: int
    began: float
    text: Windows
    others: dict[str, int] = field(default_factory=dict)
    trainer: Trainer | None = None
    step: int = 0
    steps: int = 0
    changed: set[str] = field(default_factory=set)
    sharding: Sharding | None = None
    found: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds taken, including those before an interruption."""
        return time.monotonic() - self.began

    def let_go(self) -> None:
        """After the last step, free the trainer and make a divided student whole again.

        The trainer's optimizer takes twice the memory of the trained parameters."""
        self.trainer = None
        if self.sharding:
            self.sharding.restore()
            self.sharding = None

    def state(self, teacher: str, recipe: str, processes: int, done: bool) -> RunState:
        """The state for a checkpoint. teacher, recipe: their fingerprints. processes: their number. done: whether the stage
        is over."""
        where: dict[str, Any] = (
            {"window": self.next_window, "step": 0} if done else {"window": self.window, "step": self.step}
        )
        seconds = 0.0 if done else self.seconds
        about: dict[str, Any] = {
            "teacher": teacher,
            "recipe": recipe,
            "processes": processes,
            "seconds": seconds,
            "windows": self.others,
        }
        return RunState(self.entry.index, self.entry.name, done=done, **about, **where)
