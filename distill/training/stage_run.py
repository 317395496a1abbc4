"""One stage on its way: what it is, where it stands in the training text, and what it takes."""

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

    text: the training text in its windows. window: its first one of them. next_window: the first one after it. others: where
    the next stages of other texts and lengths begin, by their name. began: the monotonic time at which it
    would have begun without interruptions. trainer: until the last step is taken; None where it takes none. step: steps
    taken so far. steps: all of them. changed: names outside the mixers of what its steps change. sharding: its parts, where
    processes divide what it trains. found: what it did to the student's layout, for evaluations.json. measured: what
    the stage itself measured after its last step.
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
        """Seconds taken, those before an interruption included."""
        return time.monotonic() - self.began

    def let_go(self) -> None:
        """Once the steps are taken: forget the trainer, whose optimizer holds twice the memory of what it trains, and make a
        whole student of parts."""
        self.trainer = None
        if self.sharding:
            self.sharding.restore()
            self.sharding = None

    def state(self, teacher: str, recipe: str, processes: int, done: bool) -> RunState:
        """What a checkpoint says of it. teacher, recipe: their fingerprints. processes: how many take its steps. done:
        whether the stage is over."""
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
