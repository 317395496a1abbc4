"""A suite: which evaluations it runs, and how much of each."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.recipe import EvaluationOptions

SIX = ("winogrande", "arc_easy", "arc_challenge", "piqa", "hellaswag", "lambada")  # recovery is measured over these
EVERYTHING = 2**20  # held-out tokens of a suite that reads the whole text, at most


@dataclass(frozen=True)
class Suite:
    """The evaluations of one suite, and their sizes.

    evaluations: those of the teacher and the student, by name. baselines: those that the baselines get too. knockouts: those
    that the student without one of its branches gets too.
    heldout_tokens: the most held-out tokens; None for as many as the recipe's final table has; EVERYTHING for the whole
    text. At least as many windows are read as the recipe's `evaluation.documents`. window: the longest window in tokens.
    items: the most items of each task, drawn by a seed; None for all. task_source: a folder of files, or "harness".
    depths, grid_trials: for recall families that are measured depth by depth: their depths, and the trials a cell.
    in_sample: tasks that selected the student's layout, which recovery leaves out.
    speed: lengths in tokens; on a CPU only those up to `speed.CPU_LENGTH`.
    """

    name: str
    evaluations: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    knockouts: tuple[str, ...] = ()
    heldout_tokens: int | None = None
    window: int | None = None
    passkey: tuple[int, ...] = ()
    passkey_trials: int = 1
    recall: tuple[int, ...] = ()
    recall_trials: int = 1
    depths: tuple[float, ...] = ()
    grid_trials: int = 1
    tasks: tuple[str, ...] = ()
    items: int | None = None
    task_source: Path | str | None = None
    in_sample: tuple[str, ...] = ()
    speed: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)

    def text(self, options: EvaluationOptions, seq_len: int) -> tuple[int, int]:
        """Return the held-out tokens to read for a recipe with these options, and the length of their windows.

        Args:
            seq_len: the length of the recipe's held-out windows.
        """
        usual = options.final_tokens or options.tokens
        length = min(seq_len, self.window or seq_len)
        if self.heldout_tokens == EVERYTHING:
            return EVERYTHING, length
        return max(min(usual, self.heldout_tokens or usual), options.documents * length), length

    def within(self, positions: int | None) -> tuple["Suite", list[dict]]:
        """Return the suite without lengths beyond the teacher's positions, and what is left out for that reason."""
        if positions is None:
            return self, []
        reason = f"the teacher has positions for {positions} tokens"
        changes: dict[str, Any] = {}
        left_out: list[dict] = []
        for name in ("passkey", "recall"):
            lengths = getattr(self, name)
            changes[name] = tuple(length for length in lengths if length <= positions)
            beyond = ", ".join(str(length) for length in lengths if length > positions)
            if beyond and name in self.evaluations:
                left_out.append({"rows": ["every"], "evaluation": name, "part": beyond, "reason": reason})
        return dataclasses.replace(self, **changes), left_out
