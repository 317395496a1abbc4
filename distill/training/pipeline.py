"""The stages of one student, run in order, with an evaluation after each and resuming from checkpoints."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from accelerate.utils import broadcast
from rich.console import Console
from rich.text import Text

from distill.build import build, recall_transfers, transfer_report
from distill.console import bold
from distill.division import dividing
from distill.errors import Interrupted, UserError
from distill.evaluation.fidelity import fidelity
from distill.evaluation.nonfinite import NotFinite
from distill.evaluation.rows import told
from distill.memory import enough_memory
from distill.runs.checkpoint import RunState
from distill.runs.progress import StageProgress, StepReport
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.stages import StageEntry, key_of, stages_of
from distill.stages.probe import finite
from distill.stages.stage import Stage
from distill.text.heldout import Heldout
from distill.training import trackers
from distill.training.beginning import begin_from, check_start, record_start
from distill.training.caches import Reading
from distill.training.fitting import fit_micro_batch
from distill.training.positions import Positions
from distill.training.references import lay_down
from distill.training.replacing import Replacing
from distill.training.saves import Saves
from distill.training.shares import sharded
from distill.training.stage_run import StageRun
from distill.training.teaching import teach
from distill.training.trainer import NonFinite, Trainer


class Pipeline:
    """Runs the stages of the session's recipe on one student, in one folder."""

    def __init__(
        self, session: Session, folder: RunDir, console: Console, stopper: Stopper, every_stage: bool = True
    ) -> None:
        """every_stage: evaluate after each stage, not only after the last."""
        self.session, self.folder, self.every_stage = session, folder, every_stage
        self.console, self.stopper = console, stopper
        self.recipe, self.teacher, self.accelerator = session.recipe, session.teacher, session.accelerator
        recipe, where = self.recipe, str(folder.path / "recipe.yaml")
        self.replacing = Replacing(session, folder, console, stopper, where)
        self.layout = self.replacing.first
        self.student, self.transfers = build(self.teacher, self.layout)
        begun = begin_from(recipe, self.teacher, self.student, self.transfers) if recipe.student else set()
        self.stages = stages_of(recipe, where)
        self.saves = Saves(session, folder, self.student, console, begun)

    def run(self, heldout: Heldout) -> None:
        """Run every stage that is not finished yet.

        Raises:
            Interrupted, NonFinite: the message of Interrupted names the last checkpoint.
            UserError: the run belongs to another teacher or text, or its checkpoint could not be restored exactly.
        """
        for this in self._stage_runs():
            with self._going(this), self._progress(this) as progress, self._only_needed(this):
                for step in range(this.step, this.steps):
                    report = cast(Trainer, this.trainer).step(step)
                    self._log(this, report, cast(StageProgress, progress))
                    self._save_where_due(this, report.step)
            this.let_go()
            self._finish(this)
            self._close(this, heldout)

    # one stage

    def _stage_runs(self) -> Iterator[StageRun]:
        """Yield each stage that is not finished, begun or restored."""
        self.saves.check_run()
        check_start(self.recipe, self.folder, self.accelerator.is_main_process)
        state = self.saves.resume(lambda state: self.replacing.reinstate(self.stages, state, self.student, self.transfers))
        if state is not None:  # records of earlier stages are only in the file
            recall_transfers(self.student, self.transfers, self.folder.read("transfer.json", {}))
        elif self.accelerator.is_main_process:
            record_start(self.recipe, self.teacher, self.student, self.transfers, self.folder)
        positions = Positions(self.session, self.stages, state)
        taken = trackers.steps_before(self.recipe, state.stage + state.done) + state.step if state else 0
        trackers.start(self.accelerator, self.recipe, self.folder, taken)
        for entry in self.stages[state.stage + state.done if state else 0 :]:
            resumed = state if state and entry.index == state.stage else None
            with enough_memory(f"stage {entry.name}", self._what_to_lower(entry)):
                this = self._begin(entry, *positions.of(entry), resumed)
            yield this
            positions.go_on(this)
            del this.stage  # frees its buffers before the next stage is made

    def _begin(self, entry: StageEntry, window: int, others: dict[str, int], state: RunState | None) -> StageRun:
        """Make a stage, and begin it or restore its saved state."""
        data, text = self.recipe.data, self.session.windows_of(entry)
        began = time.monotonic() - (state.seconds if state else 0.0)
        stage = entry.make(self.teacher, self.student, self.transfers)
        reading = Reading.of(self.recipe, entry, self.student, text, window)
        teach(self.session, self.folder, stage, reading, resumed=state is not None)
        stage.prepare()
        if entry.kind.reads_before(entry.options):
            lay_down(self.session, self.folder, stage, reading, resumed=state is not None)
        this = StageRun(entry, stage, window, window + -(-entry.options.tokens // text.seq_len), began, text, others)
        if state is None:
            self._first_work(this)
        if stage.trains and stage.trained():
            sizes = entry.batch(data), entry.micro_batch(data)
            if state is not None:
                self.saves.restore_weights(state, stage)
            this.changed = stage.changed(done=False)
            this.sharding = sharded(self.recipe, stage, self.accelerator)
            this.trainer = Trainer(stage, self.accelerator, text, window, *sizes, this.sharding)
            if entry.fits_itself(data):
                found = fit_micro_batch(this.trainer, entry, self.recipe, self.folder, self.student.layout)
                self.console.print(f"  {found}", highlight=False)
            this.steps, this.next_window = this.trainer.steps, this.trainer.next_window
        if state is not None and this.trainer is not None:
            this.step = state.step
            self.saves.restore_training(this.trainer)
        self.saves.restart_clock()
        return this

    def _first_work(self, this: StageRun) -> None:
        """Do a stage's closed-form work before its first step. If it converts layers, check that nothing else changed."""
        entry, stage, calibration = this.entry, this.stage, self.session.calibration(this.window, this.text)
        if entry.kind.changes_layout:
            self.replacing.prepare(entry, stage, calibration)
        with self.accelerator.autocast():
            stage.begin(calibration)
        if entry.kind.changes_layout:
            this.found = self.replacing.check(entry, stage)
            self.saves.follow_layout(self.replacing.left)
        self._agree(stage)

    @contextmanager
    def _going(self, this: StageRun) -> Iterator[None]:
        """Listen for signals during a stage's steps, and name the last checkpoint in the error of an interruption."""
        name = this.entry.name
        try:
            with enough_memory(f"stage {name}", self._what_to_lower(this.entry)), self.stopper.listening():
                yield
        except NonFinite as error:
            raise self._went_wrong(name, error) from error
        except Interrupted as reason:
            raise Interrupted(f"{reason} in stage {name}. {self.saves.where_to_go_on()}") from reason

    def _only_needed(self, this: StageRun) -> AbstractContextManager[None]:
        """Offload the teacher if the stage's steps do not run it."""
        return nullcontext() if this.entry.runs_teacher else self.saves.aside.away(self.student)

    def _went_wrong(self, name: str, error: UserError) -> NonFinite:
        """The error for values that are not finite; it is also kept in the run folder."""
        said = f"stage {name}: {error}. The same recipe would fail again; a changed recipe is a new run"
        if self.accelerator.is_main_process:
            self.folder.update("run.json", stopped=said)
        return NonFinite(said)

    @contextmanager
    def _progress(self, this: StageRun) -> Iterator[StageProgress | None]:
        """Show a line with the progress of a stage's steps, if it takes any."""
        if this.trainer is None:
            yield None
            return
        progress = StageProgress(self.console, this.entry.name, this.steps, this.step)
        with progress.shown():
            yield progress

    def _save_where_due(self, this: StageRun, step: int) -> None:
        """Between two steps, write a checkpoint if one is due, and stop if that was requested.

        Raises:
            Interrupted: a stop was requested; the checkpoint is written first.
        """
        this.step = step
        if step == this.steps:
            return
        reason = self.stopper.due()
        stop, checkpoint = cast(Trainer, this.trainer).anywhere(reason is not None, self.saves.due(step))
        if stop or checkpoint:
            self.saves.save(this)
        if stop:
            raise Interrupted(reason or "another process was asked to stop")

    def _finish(self, this: StageRun) -> None:
        """Do a stage's closed-form work after its last step."""
        with enough_memory(f"stage {this.entry.name}", self._what_to_lower(this.entry)):
            self.saves.changed |= this.stage.changed(done=True)
            with self.accelerator.autocast():
                this.measured = this.stage.measured()
            with self.accelerator.autocast():
                this.stage.finish(self.session.calibration(this.window, this.text))
            self._agree(this.stage)

    def _close(self, this: StageRun, heldout: Heldout) -> None:
        """Evaluate a finished stage and write its checkpoint."""
        entry, seconds = this.entry, this.seconds
        measured = self._measured(entry, heldout) | ({"preferences": this.measured} if this.measured else {})
        if self.accelerator.is_main_process:
            measured["probe"] = finite(self.saves.measure_probe())

            def add(evaluations: dict) -> None:
                found = {**measured, **this.found, "seconds": round(seconds, 1)}
                evaluations["after"] = {**evaluations.get("after", {}), entry.key: found}

            self.folder.change("evaluations.json", add)
            if entry.kind.records:
                self.folder.write("transfer.json", transfer_report(self.teacher, self.student, self.transfers))
            found = told(measured) if "kl" in measured else ""
            if pairs := measured.get("preferences"):
                found += f"   win share {pairs['win_share']:.1%} of {pairs['pairs']} held-out pairs"
            self.console.print(Text.assemble("  ", bold(f"{entry.name:<10}"), f" {seconds:5.0f} s   {found}"))
        self.saves.save(this, done=True, probed=measured.get("probe", {}))
        self.accelerator.wait_for_everyone()

    def _measured(self, entry: StageEntry, heldout: Heldout) -> dict:
        """Fidelity after a stage, measured by all processes together; empty if this stage is not evaluated.

        If an output is not finite after the last stage, the student is kept, and the final evaluation reports the error.

        Raises:
            NonFinite: an output is not finite, and a further stage would train on it.
        """
        last = entry is self.stages[-1]
        if not (self.every_stage or last):
            return {}
        try:
            lower = f"evaluation.tokens (now {self.recipe.evaluation.tokens}) or evaluation.seq_len"
            with enough_memory(f"judging after {entry.name}", lower), dividing(), self.accelerator.autocast():
                return fidelity(self.teacher, self.student, heldout)
        except NotFinite as error:
            if last:
                return {}
            raise self._went_wrong(f"{entry.name}, on held-out text", error) from error

    def _agree(self, stage: Stage) -> None:
        """Send the first process's closed-form results to all processes.

        Least squares may differ in their last bits, and later only gradients are averaged."""
        if self.accelerator.num_processes > 1:
            mixers = [tensor for mixer in self.student.mixers.values() for tensor in mixer.state_dict().values()]
            for tensor in [*mixers, *stage.buffers()]:
                broadcast(tensor)

    def _what_to_lower(self, entry: StageEntry) -> str:
        """The keys of a stage that determine its memory, as overrides take them."""
        options, data = entry.options, self.recipe.data
        count = entry.micro_batch(data)
        said = "auto" if entry.fits_itself(data) else f"{count} windows at a time"
        stage = key_of(self.recipe, entry)
        key = f"{stage}.micro_batch" if hasattr(options, "micro_batch") else "data.micro_batch"
        windows = "" if count == 1 else f"{key} (now {said}) or "
        spared = getattr(options, "activation_checkpointing", True)
        also = "" if spared is True else f", or set {stage}.activation_checkpointing=true"
        length = f"{stage}.seq_len" if getattr(options, "seq_len", None) else "data.seq_len"
        return f"{windows}{length} (now {entry.seq_len(data)} tokens){also}"

    def _log(self, this: StageRun, report: StepReport, progress: StageProgress) -> None:
        """Report one step on the screen, in metrics.jsonl and to the trackers."""
        progress.update(report)
        described = cast(Trainer, this.trainer).described(report.loss)
        if not self.accelerator.is_main_process:
            return
        name = this.entry.name
        entry = {
            "stage_index": this.entry.index,
            "stage": name,
            "step": report.step,
            "loss": report.loss,
            "lr": report.rate,
            "gradient_norm": report.gradient_norm,
            "tokens": report.tokens,
            "tokens_per_second": round(report.tokens / report.seconds, 1),
            **described,
            **gpu_memory(self.accelerator.device),
        }
        self.folder.log(**entry, **({"losses": report.losses} if len(report.losses) > 1 else {}))
        numbers = {f"{name}/{key}": value for key, value in entry.items() if isinstance(value, float)}
        self.accelerator.log(numbers, step=trackers.steps_before(self.recipe, this.entry.index) + report.step)


def gpu_memory(device: torch.device) -> dict[str, float]:
    """The peak memory of tensors on a GPU so far, in GiB; empty on a CPU."""
    return {"gpu_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2)} if device.type == "cuda" else {}
