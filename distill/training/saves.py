"""What a run saves on its way, and how it goes on from there: its facts, its checkpoints, and the probe that proves them."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text
from torch import nn

from distill.errors import UserError
from distill.runs import checkpoint, random_states
from distill.runs.checkpoint import RunState
from distill.runs.run_dir import FORMAT, RunDir, versions
from distill.runs.session import Session
from distill.stages.probe import differs, finite, probe
from distill.training.stage_run import StageRun
from teachers.fingerprint import difference

PROBE_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # relative; reductions on a GPU differ from run to run

_log = logging.getLogger(__name__)


class Saves:
    """One student's checkpoints in its run folder. `changed` names what stages have trained outside its mixers."""

    def __init__(
        self, session: Session, folder: RunDir, student: nn.Module, console: Console, begun: set[str] = frozenset()
    ) -> None:
        """begun: names of tensors outside its mixers that differed from the teacher's before the first stage."""
        self.session, self.recipe, self.folder = session, session.recipe, folder
        self.student, self.console = student, console
        self.teacher, self.accelerator = session.teacher, session.accelerator
        self.changed: set[str] = set(begun)
        self._probe_batch = session.probe_batch()
        self._last = time.monotonic()

    def check_run(self) -> None:
        """Compare what the run was started with; record it the first time.

        Raises:
            UserError: it was another teacher or text.
        """
        session = self.session
        known = self.folder.read("run.json", {})
        if part := difference(known.get("teacher", self.teacher.fingerprint), self.teacher.fingerprint):
            raise UserError(
                f"{self.folder.path}: the teacher is not the one this run was started with: they differ in the {part}; "
                "bring it back, or start again with --fresh"
            )
        facts = {
            "train_text": session.windows.meta["sha256"],
            "heldout_text": session.heldout_windows.meta["sha256"],
        }
        for name, value in facts.items():
            if known.get(name, value) != value:
                raise UserError(
                    f"{self.folder.path}: the {name.replace('_', ' ')} is not the one this run was started with; "
                    "bring it back, or start again with --fresh"
                )
        if known.get("versions", versions()) != versions():
            _log.warning(
                "package versions differ from those this run was started with; see %s", self.folder.path / "run.json"
            )
        if self.accelerator.is_main_process:
            facts |= {"stopped": None} if "stopped" in known else {}  # it is tried again
            facts["teacher"] = self.teacher.fingerprint
            self.folder.update("run.json", **facts, **({} if known else {"format": FORMAT, "versions": versions()}))

    # saving

    def due(self, step: int) -> bool:
        """Whether the end of a step calls for a checkpoint."""
        every = self.recipe.checkpoints
        return step % every.steps == 0 if every.steps else time.monotonic() - self._last > 60 * every.minutes

    def restart_clock(self) -> None:
        """Count the minutes to the next checkpoint from now."""
        self._last = time.monotonic()

    def save(self, this: StageRun, *, done: bool = False, probed: dict[str, float] | None = None) -> None:
        """Write a checkpoint of a stage, between two of its steps or when it is over.

        Args:
            probed: the probe's losses, where they were just measured.

        Raises:
            UserError: see `checkpoint.save`.
        """
        self.restart_clock()
        if not self.accelerator.is_main_process:
            return
        changed = self.changed if done else self.changed | this.stage.changed(done=False)
        about = self.teacher.fingerprint, self.recipe.fingerprint, self.accelerator.num_processes
        state = this.state(*about, done)
        state.changed = sorted(changed)
        state.probe = probed or finite(self.measure_probe())
        tensors = {"student": checkpoint.student_tensors(self.student, changed), "rng": random_states.random_tensors()}
        if not done:
            tensors["optimizer"] = this.trainer.optimizer_state()
            tensors["stage"] = dict(this.stage.named_buffers())
        checkpoint.save(self.folder.checkpoints, state, tensors, self.recipe.checkpoints.keep)

    # going on

    def resume(self, reinstate: Callable[[RunState], None]) -> RunState | None:
        """The last sound checkpoint's state; a finished stage's weights are loaded here, a running one's by `restore`.

        Args:
            reinstate: gives the student the modules that finished stages left in it.

        Raises:
            UserError: it was made with another teacher or by another recipe, was edited, or did not come back as it was
                saved.
        """
        state = self._newest()
        if state is None:
            self.folder.forget_after(-1, 0)
            return None
        path = checkpoint.latest(self.folder.checkpoints)
        if part := difference(state.teacher, self.teacher.fingerprint):
            raise UserError(
                f"{path} was made with another teacher than {self.recipe.teacher}: they differ in the {part} (fingerprints "
                f"{state.teacher} and {self.teacher.fingerprint}); bring that one back, or start again with --fresh"
            )
        checkpoint.check_origin(path, state, self.recipe.fingerprint)
        self.folder.forget_after(state.stage, math.inf if state.done else state.step)
        self.console.print(f"  going on after {'the end of' if state.done else f'step {state.step} of'} stage {state.name}")
        self._tell_of_processes(state)
        reinstate(state)
        if state.done:
            self.changed = set(state.changed)
            with checkpoint.whole(path):
                checkpoint.restore_student(self.student, checkpoint.tensors_of(path, "student"))
                random_states.load_random(checkpoint.tensors_of(path, "rng"))
            self._check_probe(state, path)
        return state

    def _tell_of_processes(self, state: RunState) -> None:
        """Say where another number of processes goes on: each sums its share of a batch, and the last bits differ."""
        before, now = state.processes, self.accelerator.num_processes
        if before and before != now:
            self.console.print(
                Text.assemble(
                    ("  warning", "yellow"),
                    f": the steps so far were taken with processes={before}, and this goes on with processes={now}: "
                    "gradients are summed in another order, so the student will differ in its last bits from "
                    "that of a run with one number of processes",
                )
            )

    def restore(self, state: RunState, this: StageRun) -> None:
        """Put the weights, buffers, optimizer and random states of a running stage back.

        Raises:
            UserError: they do not behave as they did.
        """
        path = checkpoint.latest(self.folder.checkpoints)
        self.changed = set(state.changed) - this.stage.changed(done=False)
        with checkpoint.whole(path):
            checkpoint.restore_student(self.student, checkpoint.tensors_of(path, "student"))
            for name, tensor in checkpoint.tensors_of(path, "stage").items():
                this.stage.get_buffer(name).copy_(tensor)
            this.trainer.restore(checkpoint.tensors_of(path, "optimizer"))
        self._check_probe(state, path)
        with checkpoint.whole(path):
            random_states.load_random(checkpoint.tensors_of(path, "rng"))

    def where_to_go_on(self) -> str:
        """Where the last checkpoint is, for a message that ends a run early."""
        path = checkpoint.latest(self.folder.checkpoints)
        return f"The last checkpoint is {path}; the same command goes on from it" if path else "There is no checkpoint yet"

    def measure_probe(self) -> dict[str, float]:
        """The probe batch's losses now."""
        with self.accelerator.autocast():
            return probe(self.teacher, self.student, self._probe_batch)

    def _newest(self) -> RunState | None:
        """The newest sound checkpoint's state, read and hashed by the main process and then merely read by the others."""
        if self.accelerator.is_main_process:
            state, complaints = checkpoint.newest_sound(self.folder.checkpoints)
            for complaint in complaints:
                self.console.print(f"  {complaint}")
            self.accelerator.wait_for_everyone()
            return state
        self.accelerator.wait_for_everyone()
        path = checkpoint.latest(self.folder.checkpoints)
        return None if path is None else checkpoint.read_state(path, files=False)

    def _check_probe(self, state: RunState, path: Path) -> None:
        """Refuse to go on from weights that do not behave as they did when they were saved."""
        tolerance = PROBE_TOLERANCE[self.accelerator.device.type]
        now = self.measure_probe()
        if wrong := differs(state.probe, now, tolerance):
            values = ", ".join(f"{name} {state.probe[name]:.6g} then, {now[name]:.6g} now" for name in wrong)
            raise UserError(
                f"{path} did not come back as it was saved: on the probe batch {values}. The text, the teacher, the "
                "versions or the device changed; delete the checkpoint to go on from the one before, or use --fresh"
            )
