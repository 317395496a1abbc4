"""The reference's log-probabilities for a stage: computed once before the first step and kept in the run folder.

No reference model has to run during the stage's steps then. `references/<stage>/` holds parts of `PART` windows, each with
its own hash; after an interruption, whole parts are not computed again. `about.json` holds the key of the text and model. A
resumed stage reads it, because the reference may be the student before the stage, which does not exist any more.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, cast

import torch

from distill.disk import writing
from distill.division import divided, dividing
from distill.errors import UserError
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from distill.text.pair_windows import PairWindows
from distill.training.caches import Reading
from students.skeleton import Student

PART = 64  # windows
ABOUT = "about.json"

_log = logging.getLogger(__name__)


def lay_down(session: Session, folder: RunDir, stage: Any, reading: Reading, resumed: bool) -> None:
    """Give a stage its reference's log-probabilities: read from the run folder, and computed where they are missing.

    Args:
        stage: prepared, and not trained yet unless `resumed`.

    Raises:
        UserError: the stage is resumed, its reference is the student before the stage, and a file is damaged; or a file
            cannot be written.
    """
    place, windows = folder.path / "references" / reading.entry.key, cast(PairWindows, reading.windows)
    own = reading.entry.kind.reads_before(reading.entry.options) == "student"
    key = _key(session, stage, reading, own)
    if own and resumed:  # the student has changed, so its key cannot be computed again
        key = _known(place / ABOUT) or key
    elif session.accelerator.is_main_process:
        _write(place / ABOUT, {"key": key})
    session.accelerator.wait_for_everyone()
    wanted = [int(place) for place in reading.places()] + list(range(windows.count, windows.count + len(windows.held)))
    parts = list(enumerate(wanted[at : at + PART] for at in range(0, len(wanted), PART)))
    size = max(2, 2 * (reading.entry.micro_batch(session.recipe.data) // 2))

    def work(part: tuple[int, list[int]]) -> list[float]:
        file = place / f"{part[0]:06d}.json"
        if (found := _read(file, key, part[1])) is not None:
            return found
        if own and resumed:
            raise UserError(
                f"{file} is missing or damaged, and the student that it was computed from has been trained since; restore "
                "the file, or start again with --fresh"
            )
        return _made(session, stage, windows, file, key, part[1], size)

    known = torch.full((windows.count + len(windows.held),), float("nan"))
    with dividing(), torch.no_grad():
        for (_, at), values in zip(parts, divided(parts, work), strict=True):
            known[torch.tensor(at)] = torch.tensor(values)
    device = session.accelerator.device
    stage.refer_to(known, [batch.to(device) for batch in windows.held_batches(size)])


def _made(session: Session, stage: Any, windows: PairWindows, file: Path, key: str, at: list[int], size: int) -> list[float]:
    values: list[float] = []
    for first in range(0, len(at), size):
        batch = windows.at(at[first : first + size]).to(session.accelerator.device)
        with session.accelerator.autocast():
            values += stage.reference_log_probabilities(batch).float().tolist()
    _write(file, {"key": key, "windows": at, "log_probabilities": values, "sha256": _hash(key, at, values)})
    return values


def _key(session: Session, stage: Any, reading: Reading, own: bool) -> str:
    """A hash of what the log-probabilities depend on: the text and its windows, the model, and the numeric types."""
    model = _weights(stage.student) if own else stage.targets.teacher.fingerprint
    text = f"{reading.windows.meta.sha256} {reading.windows.seq_len}"
    said = f"{text} {model} {session.accelerator.mixed_precision} {session.accelerator.device.type}"
    return hashlib.sha256(said.encode()).hexdigest()


def _weights(student: Student) -> str:
    """A hash of the sums and sums of squares of a student's tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(student.state_dict().items()):
        wide = tensor.detach().double()
        found.update(f"{name} {wide.sum().item()!r} {wide.square().sum().item()!r}\n".encode())
    return found.hexdigest()


def _known(file: Path) -> str | None:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["key"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _read(file: Path, key: str, at: list[int]) -> list[float] | None:
    """The values of a part; None if it is missing, damaged or of another key."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        values = found["log_probabilities"]
        if found["key"] == key and found["windows"] == at and found["sha256"] == _hash(key, at, values):
            return values
        _log.warning("%s belongs to another model, text or length, or is damaged; it is made again", file)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError) as error:
        _log.warning("%s cannot be read (%s); it is made again", file, error)
    return None


def _hash(key: str, at: list[int], values: list[float]) -> str:
    return hashlib.sha256(json.dumps([key, at, values]).encode()).hexdigest()


def _write(file: Path, content: dict) -> None:
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f"{file.name}~")
        scratch.write_text(json.dumps(content), encoding="utf-8")
        scratch.replace(file)
