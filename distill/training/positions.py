"""The first window of each stage in its training text.

A stage continues after the last stage that read the same text with the same seq_len; otherwise it begins at window 0."""

from collections.abc import Sequence

from distill.runs.checkpoint import RunState
from distill.runs.session import Session
from distill.stages import StageEntry
from distill.text.windows import Windows
from distill.training.stage_run import StageRun


class Positions:
    """The next window of each combination of text and window length that the stages of a recipe read."""

    def __init__(self, session: Session, stages: Sequence[StageEntry], state: RunState | None) -> None:
        """state: the checkpoint at which an earlier attempt stopped."""
        self._session, self._next = session, {}
        if state is not None:
            self._next = dict(state.windows)
            self._next[_name(session.windows_of(stages[state.stage]))] = state.window

    def of(self, entry: StageEntry) -> tuple[int, dict[str, int]]:
        """The first window of a stage, and the next ones of the texts and lengths that it does not read."""
        name = _name(self._session.windows_of(entry))
        return self._next.get(name, 0), {other: window for other, window in self._next.items() if other != name}

    def go_on(self, this: StageRun) -> None:
        """Count the windows that a stage has read."""
        self._next[_name(this.text)] = this.next_window


def _name(text: Windows) -> str:
    """The key of a text with one window length, as checkpoints hold it."""
    return f"{text.meta.sha256[:16]} {text.seq_len}"
