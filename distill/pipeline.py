"""A recipe from its teacher to its finished student: stages in order, evaluated in between, resumed where they stopped."""

import time
from functools import partial

import torch
from accelerate.utils import broadcast
from rich.console import Console

from distill import trackers
from distill.build import build, layout_of, transfer_report
from distill.checkpoint import State
from distill.errors import UserError
from distill.evaluate.fidelity import Heldout, fidelity
from distill.memory import enough_memory
from distill.progress import StageProgress
from distill.recipe import Recipe
from distill.run_dir import RunDir
from distill.saves import Saves
from distill.session import Session
from distill.stages import stage_class
from distill.stages.stage import Stage, StageOptions
from distill.trainer import Interrupted, NonFinite, Report, Stopper, Trainer


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
        where = str(folder.path / "recipe.yaml")
        self.layout = layout_of(recipe.pattern, recipe.mixers, self.teacher.n_layers, where, recipe.meta_tokens)
        self.student, self.transfers = build(self.teacher, self.layout)
        self.saves = Saves(session, recipe, folder, self.student, console)

    def run(self, heldout: Heldout) -> None:
        """Take every stage that is not over yet.

        Raises:
            Interrupted, NonFinite: after saying where the last checkpoint is.
            UserError: the run belongs to another teacher or text, or its checkpoint did not come back whole.
        """
        self.saves.check_run()
        state = self.saves.resume(self._reinstate)
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
        began = time.monotonic() - (state.seconds if state else 0.0)
        with enough_memory(f"stage {name}", self._what_to_lower(name, options)):
            stage = self._make(name, options)
            calibration = self.session.calibration(window)
            stage.prepare()
            if state is None:
                with self.accelerator.autocast():
                    stage.begin(calibration)
                self._agree(stage)
            if stage.trains and stage.trained():
                window = self._train(index, name, stage, window, state, began)
            else:
                window += -(-options.tokens // self.session.windows.seq_len)
            self.saves.changed |= stage.changed(done=True)
            with self.accelerator.autocast():
                stage.finish(calibration)
            self._agree(stage)
        self._close(index, name, window, began, heldout)
        return window

    def _agree(self, stage: Stage) -> None:
        """Closed-form results of the first process to all: least squares may differ in their last bits, and only gradients
        are shared from then on."""
        if self.accelerator.num_processes > 1:
            mixers = [tensor for mixer in self.student.mixers.values() for tensor in mixer.state_dict().values()]
            for tensor in [*mixers, *stage.buffers()]:
                broadcast(tensor)

    def _make(self, name: str, options: StageOptions) -> Stage:
        kind = stage_class(name)
        extra = (self.transfers,) if name == "initialise" else ()
        return kind(self.teacher, self.student, options, *extra).to(self.accelerator.device)

    def _reinstate(self, state: State) -> None:
        self._make(state.name, self.recipe.stage_options()[state.stage][1]).reinstate()

    def _micro_batch(self, options: StageOptions) -> int:
        """Windows at a time: the stage's own number, else the recipe's, unless the stage has a batch of its own."""
        data, batch = self.recipe.data, getattr(options, "batch", None)
        own = getattr(options, "micro_batch", None)
        return own or (data.micro_batch if batch is None else None) or batch or data.batch

    def _what_to_lower(self, name: str, options: StageOptions) -> str:
        key = f"stages.{name}.micro_batch" if hasattr(options, "micro_batch") else "data.micro_batch"
        spared = getattr(options, "activation_checkpointing", True)
        return (
            f"{key} (now {self._micro_batch(options)} windows at a time) or data.seq_len (now {self.recipe.data.seq_len} "
            f"tokens){'' if spared else f', or set stages.{name}.activation_checkpointing: true'}"
        )

    def _train(self, index: int, name: str, stage: Stage, window: int, state: State | None, began: float) -> int:
        saves, batch = self.saves, stage.options.batch or self.recipe.data.batch
        trainer = Trainer(stage, self.accelerator, self.session.windows, window, batch, self._micro_batch(stage.options))
        start = 0
        if state is not None:
            start = state.step
            saves.restore(state, stage, trainer)
        saves.restart_clock()

        def save(step: int) -> str:
            now = State(index, name, step, False, window, self.teacher.fingerprint, seconds=time.monotonic() - began)
            return saves.save(now, stage, trainer)

        progress = StageProgress(self.console, name, trainer.steps, start)
        try:
            with progress.shown():
                log = partial(self._log, index, name, stage, progress)
                trainer.run(start, save, log, self.stopper, saves.due)
        except NonFinite as error:
            raise NonFinite(f"stage {name}: {error}. {saves.where_to_go_on()}") from error
        except Interrupted as reason:
            raise Interrupted(f"{reason} in stage {name}. {saves.where_to_go_on()}") from reason
        return trainer.next_window

    def _close(self, index: int, name: str, window: int, began: float, heldout: Heldout) -> None:
        """Evaluate and checkpoint a stage that is over; `began` is when it would have begun without interruptions."""
        seconds = time.monotonic() - began
        if self.accelerator.is_main_process:
            measured = {}
            if self.every_stage or index + 1 == len(self.recipe.stages):
                with self.accelerator.autocast():
                    measured = fidelity(self.teacher, self.student, heldout)
            measured["probe"] = self.saves.measure_probe()
            evaluations = self.folder.read("evaluations.json", {})
            after = {**evaluations.get("after", {}), f"{index}-{name}": {**measured, "seconds": round(seconds, 1)}}
            self.folder.write("evaluations.json", {**evaluations, "after": after})
            if name == "initialise":  # a resumed run no longer knows what initialise recorded
                self.folder.write("transfer.json", transfer_report(self.teacher, self.student, self.transfers))
            found = (
                "held-out KL {kl:.3f}   agreement {agreement:.1%}   perplexity {perplexity:.2f}" if "kl" in measured else ""
            )
            self.console.print(f"  [bold]{name:<10}[/] {seconds:5.0f} s   {found.format(**measured)}")
            self.saves.save(State(index, name, 0, True, window, self.teacher.fingerprint), None, None, measured["probe"])
        self.accelerator.wait_for_everyone()

    def _log(self, index: int, name: str, stage: Stage, progress: StageProgress, report: Report) -> None:
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
