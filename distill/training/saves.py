"""Saving and resuming of a run: its facts in run.json, its checkpoints, and the probe that verifies them."""

import logging
import math
import time
from collections.abc import Callable, Set
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.text import Text
from torch import Tensor

from distill.errors import UserError
from distill.runs import checkpoint, random_states
from distill.runs.checkpoint import RunState
from distill.runs.divided import save_together, split
from distill.runs.run_dir import FORMAT, RunDir, versions
from distill.runs.session import Session
from distill.stages.probe import differs, finite, probe
from distill.stages.stage import Stage
from distill.training.aside import Aside
from distill.training.sharding import Sharding
from distill.training.stage_run import StageRun
from distill.training.trainer import Trainer
from students.skeleton import Student
from teachers.fingerprint import difference
from teachers.teacher import Teacher

PROBE_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # relative; reductions on a GPU are not deterministic
OTHER_TYPES = 1e-1  # tolerance where the run goes on with other numeric types

_log = logging.getLogger(__name__)


class Saves:
    """Writes and restores one student's checkpoints in its run folder.

    `changed` names the tensors outside its mixers that stages have trained."""

    def __init__(
        self, session: Session, folder: RunDir, student: Student, console: Console, begun: Set[str] = frozenset()
    ) -> None:
        """begun: names of tensors outside the mixers that differed from the teacher's before the first stage."""
        self.session, self.recipe, self.folder = session, session.recipe, folder
        self.student, self.console = student, console
        self.teacher, self.accelerator = session.teacher, session.accelerator
        self.changed: set[str] = set(begun)
        self.layouts: dict[str, str] = {}
        self.aside = Aside(self.teacher)
        self._probe_batch = session.probe_batch()
        self._last = time.monotonic()
        self._types = f"teacher {types_of(self.teacher)}, products {self.accelerator.mixed_precision}"
        self._types_changed = False

    def check_run(self) -> None:
        """Check that teacher and texts are those that the run was started with; the first time, record them.

        Raises:
            UserError: the teacher or a text differs.
        """
        session = self.session
        known = self.folder.read("run.json", {})
        if part := difference(known.get("teacher", self.teacher.fingerprint), self.teacher.fingerprint):
            raise UserError(
                f"{self.folder.path}: the teacher is not the one this run was started with: they differ in the {part}; "
                "restore the earlier one, or start again with --fresh"
            )
        facts: dict[str, Any] = {
            "train_text": session.windows.meta.sha256,
            "heldout_text": session.heldout_windows.meta.sha256,
        }
        own = {where: windows.meta.sha256 for where, windows in session.stage_texts().items()}
        texts = [(name.replace("_", " "), value, known.get(name, value)) for name, value in facts.items()]
        texts += [
            (f"text of {where}", value, known.get("stage_texts", {}).get(where, value)) for where, value in own.items()
        ]
        for name, now, then in texts:
            if then != now:
                raise UserError(
                    f"{self.folder.path}: the {name} is not the one this run was started with; "
                    "restore the earlier one, or start again with --fresh"
                )
        facts |= {"stage_texts": own} if own else {}
        if changed := _changed_versions(known.get("versions", versions()), versions()):
            _log.warning("%s: this run was started with other versions: %s", self.folder.path / "run.json", changed)
        types = known.get("types", [])
        self._types_changed = len({*types, self._types}) > 1
        if self._types_changed and self._types != types[-1]:
            self.console.print(f"  so far this run used {types[-1]}; it goes on with {self._types}")
        if self.accelerator.is_main_process:
            facts["types"] = types if self._types in types[-1:] else [*types, self._types]
            facts |= {"stopped": None} if "stopped" in known else {}  # this attempt has not failed
            word = self.teacher.fingerprint  # that of a rounded teacher has no hash of the weights: keep the recorded one
            facts["teacher"] = known.get("teacher", word) if self.teacher.rounded else word
            self.folder.update("run.json", **facts, **({} if known else {"format": FORMAT, "versions": versions()}))

    def follow_layout(self, left: dict[str, str]) -> None:
        """Include further mixers in checkpoints from now on, without the attention that they replaced.

        left: see `Replacing`."""
        there = dict(self.student.named_parameters()) | dict(self.student.named_buffers())
        self.layouts, self.changed = dict(left), self.changed & there.keys()

    # saving

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after a step."""
        every = self.recipe.checkpoints
        return step % every.steps == 0 if every.steps else time.monotonic() - self._last > 60 * every.minutes

    def restart_clock(self) -> None:
        """Restart the count of minutes to the next checkpoint."""
        self._last = time.monotonic()

    def save(self, this: StageRun, *, done: bool = False, probed: dict[str, float] | None = None) -> None:
        """Write a checkpoint of a stage, between two steps or at its end. All processes call it together.

        Args:
            probed: the probe's losses, if they were just measured.

        Raises:
            UserError: see `checkpoint.save`.
        """
        self.restart_clock()
        changed = self.changed if done else self.changed | this.changed
        about = self.teacher.fingerprint, self.recipe.fingerprint, self.accelerator.num_processes
        state = this.state(*about, done)
        state.changed, state.layouts = sorted(changed), self.layouts
        tensors: dict[str, dict[str, Tensor]] = {"rng": random_states.random_tensors()}
        held: dict[str, Any] = {}
        if this.sharding or self.accelerator.is_main_process:
            state.probe = probed or finite(self.measure_probe(this.sharding))
            tensors["student"], held["student"] = split(checkpoint.student_tensors(self.student, changed))
            if not done:
                tensors["optimizer"], held["optimizer"] = split(cast(Trainer, this.trainer).optimizer_state())
                tensors["stage"] = dict(this.stage.named_buffers())
        if self.accelerator.num_processes == 1:
            checkpoint.save(self.folder.checkpoints, state, tensors, self.recipe.checkpoints.keep)
        else:
            device = self.accelerator.device
            save_together(self.folder.checkpoints, state, tensors, held, self.recipe.checkpoints.keep, device)

    # resuming

    def resume(self, reinstate: Callable[[RunState], None]) -> RunState | None:
        """The state of the newest undamaged checkpoint; None if there is none.

        The weights of a finished stage are loaded here, those of a running stage later (`restore_weights`).

        Args:
            reinstate: gives the student the modules that finished stages left in it.

        Raises:
            UserError: the checkpoint has another teacher or recipe, was edited, or could not be restored exactly.
        """
        state = self._newest()
        if state is None:
            self.folder.forget_after(-1, 0)
            return None
        path = self._latest()
        if part := difference(state.teacher, self.teacher.fingerprint):
            raise UserError(
                f"{path} was made with another teacher than {self.recipe.teacher}: they differ in the {part} (fingerprints "
                f"{state.teacher} and {self.teacher.fingerprint}); restore that one, or start again with --fresh"
            )
        checkpoint.check_origin(path, state, self.recipe.fingerprint)
        self.folder.forget_after(state.stage, math.inf if state.done else state.step)
        self.console.print(f"  going on after {'the end of' if state.done else f'step {state.step} of'} stage {state.name}")
        self._tell_of_processes(state)
        reinstate(state)
        self.layouts = dict(state.layouts)
        if state.done:
            self.changed = set(state.changed)
            with checkpoint.whole(path):
                checkpoint.restore_student(self.student, checkpoint.tensors_of(path, "student"))
                self._load_random(path)
            self._check_probe(state, path)
        return state

    def _latest(self) -> Path:
        return cast(Path, checkpoint.latest(self.folder.checkpoints))

    def _tell_of_processes(self, state: RunState) -> None:
        """Warn if the number of processes changed: each sums its share of a batch, so the last bits differ."""
        before, now = state.processes, self.accelerator.num_processes
        if before and before != now:
            self.console.print(
                Text.assemble(
                    ("  warning", "yellow"),
                    f": the steps so far were taken with processes={before}, and the next ones with processes={now}: "
                    "gradients are summed in another order, so the student will differ in its last bits from that of "
                    "a run with a constant number of processes",
                )
            )

    def restore_weights(self, state: RunState, stage: Stage) -> None:
        """Restore the weights and buffers of a running stage, before its parameters are divided over processes.

        Raises:
            UserError: the probe's losses differ from the saved ones.
        """
        path = self._latest()
        self.changed = set(state.changed) - stage.changed(done=False)
        with checkpoint.whole(path):
            checkpoint.restore_student(self.student, checkpoint.tensors_of(path, "student"))
            for name, tensor in checkpoint.tensors_of(path, "stage").items():
                stage.get_buffer(name).copy_(tensor)
        self._check_probe(state, path)

    def restore_training(self, trainer: Trainer) -> None:
        """Restore the optimizer and the random states of a running stage."""
        path = self._latest()
        with checkpoint.whole(path):
            trainer.restore(checkpoint.tensors_of(path, "optimizer"))
            self._load_random(path)

    def _load_random(self, path: Path) -> None:
        accelerator = self.accelerator
        random_states.load_random(checkpoint.random_of(path, accelerator.process_index, accelerator.num_processes))

    def where_to_go_on(self) -> str:
        """A sentence with the path of the last checkpoint, for the message of an interrupted run."""
        path = self._latest()
        return f"The last checkpoint is {path}; the same command goes on from it" if path else "There is no checkpoint yet"

    def measure_probe(self, sharding: Sharding | None = None) -> dict[str, float]:
        """The current losses on the probe batch. sharding: of a divided student, which all processes measure together."""
        with sharding.gathered() if sharding else nullcontext(), self.accelerator.autocast(), self.aside.back():
            return probe(self.teacher, self.student, self._probe_batch)

    def _newest(self) -> RunState | None:
        """The state of the newest undamaged checkpoint. The main process checks its hashes; the others only read it."""
        if self.accelerator.is_main_process:
            state, complaints = checkpoint.newest_sound(self.folder.checkpoints)
            for complaint in complaints:
                self.console.print(f"  {complaint}")
            self.accelerator.wait_for_everyone()
            return state
        self.accelerator.wait_for_everyone()
        path = self._latest()
        return None if path is None else checkpoint.read_state(path, files=False)

    def _check_probe(self, state: RunState, path: Path) -> None:
        """Refuse to go on if the probe's losses differ from those that were saved with the weights."""
        tolerance = OTHER_TYPES if self._types_changed else PROBE_TOLERANCE[self.accelerator.device.type]
        now = self.measure_probe()
        if wrong := differs(state.probe, now, tolerance):
            values = ", ".join(f"{name} {state.probe[name]:.6g} then, {now[name]:.6g} now" for name in wrong)
            raise UserError(
                f"{path} could not be restored exactly: on the probe batch {values}. The text, the teacher, the versions "
                "or the device changed; delete the checkpoint to go on from the one before, or use --fresh"
            )


def types_of(teacher: Teacher) -> str:
    """The name of the type of a teacher's weights."""
    return str(teacher.model.dtype).removeprefix("torch.")


def _changed_versions(then: dict[str, str], now: dict[str, str]) -> str:
    """The versions that changed, as one line; empty if none did."""
    names = sorted(name for name in {**then, **now} if then.get(name) != now.get(name))
    return "; ".join(f"{name} {then.get(name, 'unknown')} then, {now.get(name, 'unknown')} now" for name in names)
