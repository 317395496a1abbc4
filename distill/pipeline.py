"""A recipe from its teacher to its finished student: stages in order, evaluated in between, resumed where they stopped."""

import logging
import math
import time
from pathlib import Path

import torch
from rich.console import Console

from distill import checkpoint, trackers
from distill.build import build, layout_of, transfer_report
from distill.checkpoint import State
from distill.errors import UserError
from distill.evaluate.fidelity import Heldout, fidelity
from distill.probe import differs, probe
from distill.progress import StageProgress
from distill.recipe import Recipe
from distill.run_dir import RunDir, versions
from distill.session import Session
from distill.stages import stage_class
from distill.stages.stage import Calibration, Stage, StageOptions
from distill.trainer import Interrupted, NonFinite, Report, Stopper, Trainer

PROBE_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # relative; reductions on a GPU differ from run to run

_log = logging.getLogger(__name__)


class Pipeline:
    """One student's way through its recipe, in one folder. `session` may be shared with another pipeline's."""

    def __init__(
        self,
        session: Session,
        recipe: Recipe,
        folder: RunDir,
        console: Console,
        stopper: Stopper,
        every_stage: bool = True,
    ) -> None:
        """every_stage: evaluate after each stage, not after the last alone."""
        self.session, self.recipe, self.folder, self.every_stage = session, recipe, folder, every_stage
        self.console, self.stopper = console, stopper
        self.teacher, self.accelerator = session.teacher, session.accelerator
        self.layout = layout_of(recipe.pattern, recipe.mixers, self.teacher.n_layers, f"{folder.path / 'recipe.yaml'}")
        self.student, self.transfers = build(self.teacher, self.layout)
        check_rates(recipe, self.student, str(folder.path / "recipe.yaml"))
        self.changed: set[str] = set()
        self._probe_batch = session.probe_batch()
        self._saved = time.monotonic()

    def run(self, heldout: Heldout) -> None:
        """Take every stage that is not over yet.

        Raises:
            Interrupted, NonFinite: after saying where the last checkpoint is.
            UserError: the run belongs to another teacher or text, or its checkpoint did not come back whole.
        """
        self._check_run()
        state = self._resume()
        window = state.window if state else 0
        taken = trackers.steps_before(self.recipe, state.stage + state.done) + state.step if state else 0
        trackers.start(self.accelerator, self.recipe, self.folder, taken)
        for index, (name, options) in enumerate(self.recipe.stage_options()):
            if state and (index < state.stage or (index == state.stage and state.done)):
                continue
            resumed = state if state and index == state.stage else None
            window = self._stage(index, name, options, window, resumed, heldout)

    # one stage

    def _stage(
        self, index: int, name: str, options: StageOptions, window: int, state: State | None, heldout: Heldout
    ) -> int:
        """Take one stage from its beginning or its checkpoint; the first window of text after it."""
        began = time.monotonic()
        stage = self._make(name, options)
        calibration = self._calibration(window)
        stage.prepare()
        if state is None:
            with self.accelerator.autocast():
                stage.begin(calibration)
        if stage.trains and stage.trained():
            window = self._train(index, name, stage, window, state)
        else:
            window += -(-options.tokens // self.session.windows.seq_len)
        self.changed |= stage.changed(done=True)
        with self.accelerator.autocast():
            stage.finish(calibration)
        self._close(index, name, window, time.monotonic() - began, heldout)
        return window

    def _make(self, name: str, options: StageOptions) -> Stage:
        kind = stage_class(name)
        extra = (self.transfers,) if name == "initialise" else ()
        return kind(self.teacher, self.student, options, *extra).to(self.accelerator.device)

    def _train(self, index: int, name: str, stage: Stage, window: int, state: State | None) -> int:
        data, options = self.recipe.data, stage.options
        batch = options.batch or data.batch
        micro_batch = options.micro_batch or (data.micro_batch if options.batch is None else None) or batch
        trainer = Trainer(stage, self.accelerator, self.session.windows, window, batch, micro_batch)
        start = 0
        if state is not None:
            start = state.step
            self._restore(state, stage, trainer)
        self._saved = time.monotonic()

        def save(step: int) -> str:
            return self._save(State(index, name, step, False, window, self.teacher.fingerprint), stage, trainer)

        def due(step: int) -> bool:
            every = self.recipe.checkpoints
            return step % every.steps == 0 if every.steps else time.monotonic() - self._saved > 60 * every.minutes

        progress = StageProgress(self.console, name, trainer.steps, start)
        try:
            with progress.shown():
                trainer.run(start, save, lambda report: self._log(index, name, stage, report, progress), self.stopper, due)
        except NonFinite as error:
            raise NonFinite(f"stage {name}: {error}. {self._where_to_go_on()}") from error
        except Interrupted as reason:
            raise Interrupted(f"{reason} in stage {name}. {self._where_to_go_on()}") from reason
        return trainer.next_window

    def _close(self, index: int, name: str, window: int, seconds: float, heldout: Heldout) -> None:
        """Evaluate and checkpoint a stage that is over."""
        if self.accelerator.is_main_process:
            measured = {}
            if self.every_stage or index + 1 == len(self.recipe.stages):
                with self.accelerator.autocast():
                    measured = fidelity(self.teacher, self.student, heldout)
            measured["probe"] = self._measure_probe()
            evaluations = self.folder.read("evaluations.json", {})
            after = {**evaluations.get("after", {}), f"{index}-{name}": {**measured, "seconds": round(seconds, 1)}}
            self.folder.write("evaluations.json", {**evaluations, "after": after})
            if name == "initialise":  # a resumed run no longer knows what initialise recorded
                self.folder.write("transfer.json", transfer_report(self.teacher, self.student, self.transfers))
            found = (
                "held-out KL {kl:.3f}   agreement {agreement:.1%}   perplexity {perplexity:.2f}" if "kl" in measured else ""
            )
            self.console.print(f"  [bold]{name:<10}[/] {seconds:5.0f} s   {found.format(**measured)}")
            self._save(State(index, name, 0, True, window, self.teacher.fingerprint), None, None, measured["probe"])
        self.accelerator.wait_for_everyone()

    def _calibration(self, window: int) -> Calibration:
        """Training text from a window on, for closed-form work."""
        windows, size = self.session.windows, self.recipe.data.micro_batch or self.recipe.data.batch

        def batches(tokens: int):
            count = max(1, tokens // windows.seq_len)
            for offset in range(0, count, size):
                yield windows.batch(window + offset, min(size, count - offset)).to(self.accelerator.device)

        return batches

    def _log(self, index: int, name: str, stage: Stage, report: Report, progress: StageProgress) -> None:
        progress.update(report)
        if not self.accelerator.is_main_process:
            return
        entry = {
            "stage_index": index,
            "stage": name,
            "step": report.step,
            "loss": report.loss,
            "lr": report.rate,
            "gradient_norm": report.gradient_norm,
            "tokens": report.tokens,
            "tokens_per_second": round(report.tokens / report.seconds, 1),
            **stage.describe(report.loss),
            **gpu_memory(self.accelerator.device),
        }
        self.folder.log(**entry, **({"losses": report.losses} if len(report.losses) > 1 else {}))
        numbers = {f"{name}/{key}": value for key, value in entry.items() if isinstance(value, float)}
        self.accelerator.log(numbers, step=trackers.steps_before(self.recipe, index) + report.step)

    # checkpoints

    def _save(
        self, state: State, stage: Stage | None, trainer: Trainer | None, probed: dict[str, float] | None = None
    ) -> str:
        self._saved = time.monotonic()
        if not self.accelerator.is_main_process:
            return ""
        changed = self.changed | (stage.changed(done=False) if stage else set())
        state.changed = sorted(changed)
        state.probe = probed or self._measure_probe()
        tensors = {"student": checkpoint.student_tensors(self.student, changed), "rng": checkpoint.random_tensors()}
        if trainer is not None:
            tensors["optimizer"] = trainer.optimizer_state()
            tensors["stage"] = dict(stage.named_buffers())
        return str(checkpoint.save(self.folder.checkpoints, state, tensors, self.recipe.checkpoints.keep))

    def _resume(self) -> State | None:
        """The last checkpoint's state; a finished stage's weights are loaded here, a running one's when it is made."""
        if self.accelerator.is_main_process:
            for complaint in checkpoint.set_damaged_aside(self.folder.checkpoints):
                self.console.print(f"  {complaint}")
        self.accelerator.wait_for_everyone()
        path = checkpoint.latest(self.folder.checkpoints)
        if path is None:
            self.folder.forget_after(-1, 0)
            return None
        state = checkpoint.read_state(path)
        if state.teacher != self.teacher.fingerprint:
            raise UserError(
                f"{path} was made with another teacher than {self.recipe.teacher} (fingerprints {state.teacher} and "
                f"{self.teacher.fingerprint}); bring that one back, or start again with --fresh"
            )
        self.folder.forget_after(state.stage, math.inf if state.done else state.step)
        self.console.print(f"  going on after {'the end of' if state.done else f'step {state.step} of'} stage {state.name}")
        if state.done:
            self.changed = set(state.changed)
            self._make(state.name, self.recipe.stage_options()[state.stage][1]).reinstate()
            checkpoint.load_student(self.student, checkpoint.tensors_of(path, "student"))
            checkpoint.load_random(checkpoint.tensors_of(path, "rng"))
            self._check_probe(state, path)
        return state

    def _restore(self, state: State, stage: Stage, trainer: Trainer) -> None:
        path = checkpoint.latest(self.folder.checkpoints)
        self.changed = set(state.changed) - stage.changed(done=False)
        checkpoint.load_student(self.student, checkpoint.tensors_of(path, "student"))
        for name, tensor in checkpoint.tensors_of(path, "stage").items():
            stage.get_buffer(name).copy_(tensor)
        trainer.restore(checkpoint.tensors_of(path, "optimizer"))
        self._check_probe(state, path)
        checkpoint.load_random(checkpoint.tensors_of(path, "rng"))

    def _check_probe(self, state: State, path: Path) -> None:
        """Refuse to go on from weights that do not behave as they did when they were saved."""
        tolerance = PROBE_TOLERANCE[self.accelerator.device.type]
        now = self._measure_probe()
        if wrong := differs(state.probe, now, tolerance):
            values = ", ".join(f"{name} {state.probe[name]:.6g} then, {now[name]:.6g} now" for name in wrong)
            raise UserError(
                f"{path} did not come back as it was saved: on the probe batch {values}. The text, the teacher, the "
                "versions or the device changed; delete the checkpoint to go on from the one before, or use --fresh"
            )

    def _measure_probe(self) -> dict[str, float]:
        with self.accelerator.autocast():
            return probe(self.teacher, self.student, self._probe_batch)

    def _check_run(self) -> None:
        """Compare what the run was started with; record it the first time."""
        session = self.session
        facts = {
            "teacher": self.teacher.fingerprint,
            "train_text": session.windows.meta["sha256"],
            "heldout_text": session.heldout_windows.meta["sha256"],
        }
        known = self.folder.read("run.json", {})
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
            self.folder.update("run.json", **facts, **({} if known else {"versions": versions()}))

    def _where_to_go_on(self) -> str:
        path = checkpoint.latest(self.folder.checkpoints)
        return f"The last checkpoint is {path}; the same command goes on from it" if path else "There is no checkpoint yet"


def gpu_memory(device: torch.device) -> dict[str, float]:
    """The most memory that tensors took on a GPU so far, in GiB; nothing to say of a CPU."""
    return {"gpu_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2)} if device.type == "cuda" else {}


def check_rates(recipe: Recipe, student, where: str) -> None:
    """Refuse a recipe that gives rates by role and leaves out one that a later stage will need, or whose stages' options
    do not fit the student.

    Raises:
        UserError: naming the stage, and the role or the option.
    """
    stages = recipe.stage_options()
    for index, (name, options) in enumerate(stages):
        kind = stage_class(name)
        try:
            kind.check(student, options, last=index + 1 == len(stages))
            for role in sorted(kind.roles(student, options)):
                options.rate(role)
        except ValueError as error:
            raise UserError(f"{where}: stages.{name}: {error}") from error
