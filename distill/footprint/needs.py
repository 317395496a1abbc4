"""The memory and time that a recipe's training stages need on GPUs, and what to lower if they do not fit."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from transformers import PretrainedConfig

from distill.errors import reason_of
from distill.footprint import Footprint, Shape, footprint, most_windows
from distill.moments import EIGHT_BIT
from distill.recipe import Recipe
from distill.stages import StageEntry, stages_of
from distill.stages.rates import rate_of
from distill.stages.stage import TrainingOptions
from students.skeleton import Student
from teachers.families import Family

_log = logging.getLogger(__name__)
GIB = 2**30
LEFT = 0.93  # share of a GPU's memory that `micro_batch: auto` may fill


@dataclass(frozen=True)
class Need:
    """The needs of a training stage.

    windows: at a time. footprint: on each GPU; None if it cannot be computed. tokens_per_second: of one GPU, and said: the
    source of this rate. hours: GPU hours. lower: what to lower if the stage does not fit; None if it fits."""

    windows: int
    footprint: Footprint | None
    tokens_per_second: float | None
    said: str
    hours: float | None
    lower: str | None = None
    optimizer: str = "adamw"

    def numbers(self) -> dict:
        """The needs as a mapping for JSON."""
        memory = None if self.footprint is None else {**vars(self.footprint), "peak": self.footprint.peak}
        rest = {name: value for name, value in vars(self).items() if name not in ("footprint", "said")}
        return {**rest, "bytes": memory, "rate_from": self.said}


def needs_of(
    recipe: Recipe,
    config: PretrainedConfig,
    family: Family,
    students: Sequence[Student],
    parameters: int,
    gpus: int,
    gib: float,
    divides: str,
) -> dict[str, Need]:
    """The needs of each training stage, by its name in a plan.

    Args:
        students: the student of each stage. parameters: of the teacher. gpus: the number of GPUs that share a batch. gib:
            the memory of one GPU. divides: what they divide in stages that train the student end to end: "none", "student"
            (masters, gradients and moments) or "all" (the teacher too).
    """
    found, names = {}, set()
    for entry in stages_of(recipe):
        key = entry.name if entry.name not in names else f"{entry.name} ({entry.index})"
        names.add(key)
        if entry.kind.trains:
            under = students[entry.index]
            shape = Shape.of(recipe, config, family, under.layout, gpu=recipe.device != "cpu")
            shape = replace(shape, newest=tuple(under.newest))
            found[key] = _need(recipe, shape, entry, parameters, gpus, gib, divides)
    return found


def _need(recipe: Recipe, shape: Shape, entry: StageEntry, parameters: int, gpus: int, gib: float, divides: str) -> Need:
    share = max(1, entry.batch(recipe.data) // gpus)
    windows = min(entry.micro_batch(recipe.data), share)
    if entry.fits_itself(recipe.data):
        windows = _most(recipe, shape, entry, share, gib * GIB)
    taken = _footprint(recipe, shape, entry, windows, share)
    if taken is not None and divides != "none" and entry.kind.whole_student:
        taken = taken.sharded(gpus, teacher_too=divides == "all")
    rate = rate_of(entry.kind.rates, parameters) if shape.gpu else None
    hours = None if rate is None else entry.options.tokens / rate.tokens / 3600
    over = taken is not None and taken.peak > gib * GIB
    lower = what_to_lower(recipe, entry, taken, windows) if taken is not None and over else None
    said, optimizer = rate.said if rate else "not measured", cast(TrainingOptions, entry.options).optimizer
    return Need(windows, taken, rate and rate.tokens, said, hours, lower, optimizer)


def _footprint(recipe: Recipe, shape: Shape, entry: StageEntry, windows: int, share: int) -> Footprint | None:
    try:
        return footprint(shape, entry, entry.seq_len(recipe.data), windows, accumulates=share > windows)
    except Exception as error:  # of any type: an operation reads values
        _log.info("the memory of %s cannot be computed: %s: %s", entry.name, type(error).__name__, reason_of(error))
        return None


def _most(recipe: Recipe, shape: Shape, entry: StageEntry, share: int, room: float) -> int:
    """The most windows at a time that fit `room` bytes; 1 if none fits or the memory cannot be computed."""
    one, two = (_footprint(recipe, shape, entry, count, share) for count in (1, 2))
    if one is None or two is None:
        return 1
    each = two.activations - one.activations
    return max(1, most_windows(share, lambda count: one.peak + (count - 1) * each <= LEFT * room))


def what_to_lower(recipe: Recipe, entry: StageEntry, taken: Footprint, windows: int) -> str:
    """The keys that reduce a stage's memory, the most effective first."""
    stage = f"stages.{entry.index}.{entry.name}"
    steady = taken.trained + taken.gradients + taken.moments
    batch = (
        f"{stage}.micro_batch (now {windows})"
        if windows > 1
        else f"the length of windows (now {entry.seq_len(recipe.data)})"
    )
    spared = getattr(entry.options, "activation_checkpointing", True)
    again = [] if spared is True else [f"set {stage}.activation_checkpointing=true"]
    narrow = getattr(entry.options, "train", "mixers") == "all"
    less = [f"set {stage}.train=mixers or lora"] if narrow else []
    less += [f"set {stage}.optimizer={EIGHT_BIT}"] if cast(TrainingOptions, entry.options).optimizer != EIGHT_BIT else []
    more = ["more GPUs (--gpus)"] if entry.kind.whole_student else []
    fixes = [f"lower {batch}", *again]
    return ", or ".join([*less, *more, *fixes] if steady > taken.activations else [*fixes, *less, *more])
