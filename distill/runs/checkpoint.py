"""Checkpoints: everything that a stage needs to resume bit-exactly, written completely or not at all.

student.safetensors     every tensor that differs from the student that is built from the teacher
optimizer.safetensors   AdamW's moments and step counts, by parameter name
stage.safetensors       the stage's own buffers            rng.safetensors   random states
state.json              stage, step, data position, probe losses, hashes of the files above

With several processes, each adds files of the tensor rows that it holds (`distill.runs.parts`).
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

from distill.disk import FIX, file_hash, refuse_link
from distill.errors import UserError, reason_of
from distill.memory import ran_out
from distill.mixed_types import join_types
from distill.reading import read_json
from distill.runs import parts
from distill.runs.parts import Stored
from distill.runs.records import Numbers, Record, Whole
from students.skeleton import Student

Groups = Mapping[str, Mapping[str, Tensor]]

SCRATCH, DAMAGED = ".writing-", ".damaged-"
PLACE = re.compile(r"(\d{1,6})-\w+-(\d{1,12}|end)")  # a checkpoint's folder
FALL_BACK = "delete it to go on from the one before, or start again with --fresh"
MOST_STATE = 16 * 2**20  # bytes of a state; its longest part names the trained tensors
HASHED_AT_ONCE = 4  # files; hashing takes one core, and seconds for a file of a large student
END = "end"  # in place of the step, when a stage is over


@dataclass
class RunState:
    """The position of a run. `stage` is the index of the stage, `step` its steps so far, `done` whether it is over.

    window: the next window of the stage's text. windows: those of other texts and lengths. changed: names of the backbone's
    parameters that stages have trained. seconds: the time that a running stage took so far. layouts: the pattern after each
    stage that converted layers, by its index. teacher, recipe: their fingerprints. processes: the number that took its
    steps. digest: a hash of all other entries, as saved; states of earlier versions have none, and 0 `processes`.
    """

    stage: int
    name: str
    step: int
    done: bool
    window: int
    teacher: str
    changed: list[str] = field(default_factory=list)
    probe: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    recipe: str = ""
    processes: int = 0
    windows: dict[str, int] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    digest: str = ""

    @property
    def place(self) -> str:
        """The name of its folder."""
        return f"{self.stage}-{self.name}-{END if self.done else f'{self.step:07d}'}"

    def hashed(self) -> str:
        """The digest of the current entries."""
        left_out = {"digest", *(name for name in ("processes", "windows", "layouts") if not getattr(self, name))}
        entries = {name: value for name, value in asdict(self).items() if name not in left_out}
        return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


Name = Annotated[
    str, Field(pattern=rf"^((student|optimizer|stage|rng)({parts.NUMBERED})?\.safetensors|parts{parts.NUMBERED}\.json)$")
]


class _Schema(Record):
    """The content of state.json."""

    model_config = ConfigDict(extra="forbid")

    stage: Whole
    name: Annotated[str, Field(pattern=r"^\w+$")]
    step: Whole
    done: bool
    window: Whole
    teacher: str
    changed: list[str] = []
    probe: Numbers = {}
    files: dict[Name, str] = {}
    seconds: float = 0.0
    recipe: str = ""
    processes: Whole = 0
    windows: dict[str, Whole] = {}
    layouts: dict[Annotated[str, Field(pattern=r"^\d{1,6}$")], Annotated[str, Field(pattern="^[A-Z]{1,1024}$")]] = {}
    digest: str = ""


STATE = TypeAdapter(_Schema)


def save(folder: Path, state: RunState, tensors: Groups, keep: int) -> Path:
    """Write a checkpoint and delete all but the last `keep`.

    Args:
        tensors: by file ("student", "optimizer", "stage", "rng"), each a mapping from names.

    Raises:
        UserError: the disk is full or the folder cannot be written; earlier checkpoints stay.
    """
    return end(folder, begin(folder, state), state, tensors, keep, {})


def begin(folder: Path, state: RunState) -> Path:
    """Make the empty scratch folder in which a checkpoint is written until it is complete."""
    refuse_link(folder)
    refuse_link(folder / state.place)
    scratch = folder / f"{SCRATCH}{state.place}"
    with written(folder / state.place, scratch):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    return scratch


def end(folder: Path, scratch: Path, state: RunState, tensors: Groups, keep: int, files: dict[str, str]) -> Path:
    """Write the undivided tensors and the state, and rename the scratch folder. files: hashes of files already written."""
    target = folder / state.place
    with written(target, scratch):
        state.files = {}
        for name, group in tensors.items():
            file = scratch / f"{name}.safetensors"
            state.files[file.name] = parts.write_tensors(file, group)
        state.files |= files
        state.digest = state.hashed()
        (scratch / "state.json").write_text(json.dumps(asdict(state), indent=1))
        parts.sync(scratch / "state.json")
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
        parts.sync(folder)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


@contextmanager
def written(target: Path, scratch: Path | None) -> Iterator[None]:
    """Name the checkpoint in errors of writing, and delete its scratch folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        said = str(error) or reason_of(error)
        raise UserError(
            f"the checkpoint {target} could not be written ({said}); earlier ones are untouched: {FIX}"
        ) from error


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = _all(folder)
    return found[-1] if found else None


def newest_sound(folder: Path) -> tuple[RunState | None, list[str]]:
    """Find the newest undamaged checkpoint. Damaged newer ones are renamed, and incomplete ones are deleted.

    Returns:
        its state (None if there is none), and for each damaged one a line with the damage and its new name.
    """
    for half_written in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(half_written, ignore_errors=True)
    complaints: list[str] = []
    while (path := latest(folder)) is not None:
        try:
            return read_state(path), complaints
        except UserError as error:
            aside = path.with_name(DAMAGED + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            complaints.append(f"{error}; set aside as {aside.name}")
    return None, complaints


def read_state(checkpoint: Path, *, files: bool = True) -> RunState:
    """Read a checkpoint's state. files: also check its files against their hashes.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        content = read_json(checkpoint / "state.json", STATE, fix="it is left out", most=MOST_STATE)
        state = RunState(**content)
        if files:
            with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
                found = pool.map(lambda name: file_hash(checkpoint / name), state.files)
                wrong = [name for name, one in zip(state.files, found, strict=True) if one != state.files[name]]
            if wrong:
                raise UserError(f"{checkpoint / wrong[0]} is damaged")
    except OSError as error:
        raise UserError(f"{checkpoint} is damaged ({Path(error.filename or '').name}: {reason_of(error)})") from error
    return state


def check_origin(checkpoint: Path, state: RunState, recipe: str) -> None:
    """Refuse a checkpoint of another run, or one whose state was changed after it was saved.

    Args:
        recipe: the fingerprint of the recipe that resumes.

    Raises:
        UserError: naming the checkpoint and the fix.
    """
    fix = FALL_BACK
    if state.recipe and state.recipe != recipe:
        raise UserError(
            f"{checkpoint} was made by another recipe (fingerprint {state.recipe}, this one has {recipe}), so it was copied "
            f"here from another run; {fix}"
        )
    if (state.digest and state.digest != state.hashed()) or checkpoint.name != state.place:
        raise UserError(f"{checkpoint / 'state.json'} is not what was saved (it was edited, or its folder renamed); {fix}")


def tensors_of(checkpoint: Path, name: str) -> Stored:
    """The whole tensors of a file or of its parts, by the file's name without suffix; empty if the checkpoint has none."""
    return Stored(checkpoint, name)


def random_of(checkpoint: Path, which: int, world: int) -> Stored:
    """The random states of a process; those of the first if another number of processes wrote the checkpoint."""
    own = Path(parts.numbered("rng.safetensors", which, world)).stem
    return Stored(checkpoint, own if (checkpoint / f"{own}.safetensors").exists() else "rng")


@contextmanager
def whole(checkpoint: Path) -> Iterator[None]:
    """Name the checkpoint in errors of restoring: malformed files, unknown names or wrong shapes of tensors, random states
    that cannot be set.

    Raises:
        UserError: naming the checkpoint and the fix.
    """
    try:
        yield
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if ran_out(error):
            raise
        known = isinstance(error, OSError | SafetensorError)
        said = reason_of(error) if known else "its tensors are not those of this student's run"
        raise UserError(f"{checkpoint} is damaged ({said}); {FALL_BACK}") from error


def student_tensors(student: Student, changed: set[str]) -> dict[str, Tensor]:
    """Tensors to save: those that only the student has, and the backbone's that stages trained."""
    everything = dict(student.named_parameters()) | dict(student.named_buffers())
    return {name: t for name, t in everything.items() if name in changed or name.startswith(student.own_prefixes)}


@torch.no_grad()
def restore_student(student: Student, tensors: Mapping[str, Tensor]) -> None:
    """Restore a checkpoint's tensors by name. Masters stay float32, although a newly built student has such tensors in the
    teacher's narrower type.

    Raises:
        UserError: the student lacks a tensor of the checkpoint, or has it in another shape.
    """
    everything = dict(student.named_parameters()) | dict(student.named_buffers())
    for name, tensor in tensors.items():
        if name not in everything or everything[name].shape != tensor.shape:
            raise UserError(f"the checkpoint's {name} does not fit this student: another layout or teacher made it")
        kept = everything[name].dtype
        kind = torch.promote_types(kept, torch.float32) if kept.is_floating_point else kept
        everything[name].data = tensor.to(everything[name].device, kind)
    join_types(student)


def _all(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""

    def age(path: Path) -> tuple[int, float]:
        stage, _, step = path.name.split("-")
        return int(stage), math.inf if step == END else int(step)

    found = [path for path in folder.glob("*-*-*") if PLACE.fullmatch(path.name) and os.path.lexists(path / "state.json")]
    return sorted(found, key=age)
