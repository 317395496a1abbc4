"""What each suite runs, and how much of it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from distill.errors import UserError, nearest
from distill.recipe import Evaluation

SIX = ("winogrande", "arc_easy", "arc_challenge", "piqa", "hellaswag", "lambada")  # recovery is measured over these
FURTHER = ("openbookqa", "boolq", "mmlu_cloze", "mmlu_letters", "swde", "fda", "squad")
EVERYTHING = 2**20  # held-out tokens of a suite that reads the whole text, at most


@dataclass(frozen=True)
class Suite:
    """One suite.

    evaluations: by name, of the teacher and the student. baselines: those that the other rows get too.
    heldout_tokens: at most; None for as many as the recipe's final table has; EVERYTHING, for the whole text.
    items: of each task at most, drawn by a seed; None for all. task_source: a folder of files, or "harness".
    depths, grid_trials: of recall families that are measured depth by depth, and their trials a cell.
    speed: lengths; a CPU times those up to `speed.CPU_LENGTH` alone.
    """

    name: str
    evaluations: tuple[str, ...]
    baselines: tuple[str, ...]
    heldout_tokens: int | None = None
    passkey: tuple[int, ...] = ()
    passkey_trials: int = 1
    recall: tuple[int, ...] = ()
    recall_trials: int = 1
    depths: tuple[float, ...] = ()
    grid_trials: int = 1
    tasks: tuple[str, ...] = ()
    items: int | None = None
    task_source: Path | str | None = None
    speed: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)

    def tokens(self, options: Evaluation) -> int:
        """Held-out tokens to read, for a recipe with these options."""
        usual = options.final_tokens or options.tokens
        if self.heldout_tokens is None:
            return usual
        return EVERYTHING if self.heldout_tokens == EVERYTHING else min(usual, self.heldout_tokens)

    def within(self, positions: int | None) -> tuple["Suite", list[dict]]:
        """The suite without lengths that the teacher has no positions for, and what was left out for it."""
        if positions is None:
            return self, []
        reason = f"the teacher has positions for {positions} tokens"
        changes, left_out = {}, []
        for name in ("passkey", "recall"):
            lengths = getattr(self, name)
            changes[name] = tuple(length for length in lengths if length <= positions)
            beyond = ", ".join(str(length) for length in lengths if length > positions)
            if beyond and name in self.evaluations:
                left_out.append({"rows": ["every"], "evaluation": name, "part": beyond, "reason": reason})
        return dataclasses.replace(self, **changes), left_out


SUITES = {
    "quick": Suite(
        name="quick",
        evaluations=("fidelity", "passkey", "tasks"),
        baselines=("fidelity", "passkey"),
        heldout_tokens=2048,
        passkey=(256, 512, 1024),
        passkey_trials=4,
        tasks=SIX,
        items=50,
    ),
    "standard": Suite(
        name="standard",
        evaluations=("fidelity", "passkey", "recall", "tasks", "speed"),
        baselines=("fidelity", "passkey", "recall", "tasks"),
        passkey=(512, 1024, 2048, 4096),
        passkey_trials=10,
        recall=(512, 1024, 2048, 4096),
        recall_trials=10,
        depths=(0.0, 0.25, 0.5, 0.75, 1.0),
        grid_trials=4,
        tasks=SIX,
        speed=(1024, 2048, 4096, 8192, 16_384, 32_768),
    ),
    "full": Suite(
        name="full",
        evaluations=("fidelity", "passkey", "recall", "tasks", "speed"),
        baselines=("fidelity", "passkey", "recall", "tasks"),
        heldout_tokens=EVERYTHING,
        passkey=(512, 1024, 2048, 4096, 8192, 16_384, 32_768),
        passkey_trials=20,
        recall=(512, 1024, 2048, 4096, 8192, 16_384, 32_768),
        recall_trials=20,
        depths=(0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0),
        grid_trials=10,
        tasks=SIX + FURTHER,
        speed=(1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072),
        batches=(1, 8),
    ),
}


def find_suite(name: str) -> Suite:
    """A suite by name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in SUITES:
        raise UserError(f"there is no suite {name!r}; {nearest(name, SUITES)}")
    return SUITES[name]


def suite_of_run(options: Evaluation) -> Suite:
    """What ends a run: fidelity, and passkey recall as its recipe asks for it."""
    return Suite(
        name="run",
        evaluations=("fidelity", "passkey"),
        baselines=("fidelity", "passkey"),
        passkey=tuple(options.passkey),
        passkey_trials=options.passkey_trials,
    )
