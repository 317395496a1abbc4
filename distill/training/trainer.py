"""The optimizer step of the training loop: backward on each loss, clipping, update. It is the same for all stages."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.errors import UserError
from distill.moments import wide_names
from distill.runs.divided import load_optimizer, optimizer_tensors
from distill.runs.parts import Stored
from distill.runs.progress import StepReport
from distill.stages.stage import Stage
from distill.stages.stepping import Stepping
from distill.text.windows import Batch, Batches
from distill.training.optim import make_optimizer, rate_factor, set_rates
from distill.training.reduction import average_gradients, first_nonfinite_name, total_norm
from distill.training.sharding import Sharding


class NonFinite(UserError):
    """A loss or gradient is not finite."""


def steps_of(tokens: int, batch: int, seq_len: int) -> int:
    """The number of optimizer steps of `batch` windows that `tokens` tokens give; at least one."""
    return max(1, round(tokens / (batch * seq_len)))


class Trainer:
    """Trains one stage, step by step.

    Args:
        windows, first: the training text and the stage's first window. batch, micro_batch: windows of an optimizer step, and
        of one forward and backward pass on one device. sharding: the divided student, if processes divide it.

    Raises:
        UserError: the batch is not a multiple of the number of processes.
    """

    def __init__(
        self,
        stage: Stage,
        accelerator: Accelerator,
        windows: Batches,
        first: int,
        batch: int,
        micro_batch: int,
        sharding: Sharding | None = None,
    ) -> None:
        self.stage, self.accelerator, self.windows, self.first = stage, accelerator, windows, first
        self.sharding = sharding
        self.batch, self.world = batch, accelerator.num_processes
        if batch % self.world:
            raise UserError(
                f"a batch of {batch} windows cannot be shared by {self.world} processes; make it a multiple of {self.world}"
            )
        self.micro_batch = min(micro_batch, batch // self.world)
        self.steps = steps_of(stage.options.tokens, batch, windows.seq_len)
        self.parameters: dict[str, nn.Parameter] = {name: entry[1] for name, entry in stage.trained().items()}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        wide = wide_names(stage.student, self.parameters)
        self.optimizer = make_optimizer(stage.trained(), stage.options, wide, stage.rate_factor)
        self.stepping = Stepping(stage, accelerator.mixed_precision != "no", stage.options.compile)

    @property
    def next_window(self) -> int:
        """The first window after those of this stage."""
        return self.first + self.steps * self.batch

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's state by parameter name."""
        return optimizer_tensors(self.optimizer, {id(parameter): name for name, parameter in self.parameters.items()})

    def restore(self, tensors: Stored) -> None:
        """Restore the optimizer's state."""
        load_optimizer(self.optimizer, self.parameters, tensors)

    def step(self, step: int) -> StepReport:
        """Take one optimizer step; the first is 0.

        Raises:
            NonFinite: a loss or a gradient is not finite; the message names the step and the layer or parameter.
        """
        began = time.monotonic()
        rate = set_rates(self.optimizer, rate_factor(step, self.steps, self.stage.options))
        parts = self._sized_parts(step)
        with self.stepping():
            losses = self._reduced(self._accumulated(*parts))
        self._check(losses, step)
        norm = self._clip(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mean = sum(losses.values()) / max(len(losses), 1)
        tokens = self.batch * self.windows.seq_len
        return StepReport(step + 1, tokens, mean, losses, norm, rate, time.monotonic() - began)

    def _accumulated(self, parts: list[Batch], sizes: list[float], whole: float) -> dict[str, Tensor]:
        """Accumulate the gradients of this process's micro-batches. Returns its share of each loss; see `_sized_parts`."""
        whole = whole or 1.0  # a step without trained tokens has losses of 0
        sums: dict[str, Tensor] = {}
        for number, (part, size) in enumerate(zip(parts, sizes, strict=True), start=1):
            if self.sharding:
                self.sharding.micro_batch(last=number == len(parts))
            draw = iter(self.stage.losses(part))
            while True:  # backward runs before the next loss is computed, so that only one graph is in memory
                with self.accelerator.autocast():
                    drawn = next(draw, None)
                if drawn is None:
                    break
                self.accelerator.backward(drawn[1] * (size * self.world / whole))
                sums[drawn[0]] = sums.get(drawn[0], 0.0) + drawn[1].detach() * (size / whole)
        return sums

    def anywhere(self, *flags: bool) -> list[bool]:
        """Each flag, combined with "or" over processes. Clocks and signals differ, but all must save and stop together."""
        if self.world == 1:
            return list(flags)
        counts = torch.tensor([float(flag) for flag in flags], device=self.accelerator.device)
        return (self.accelerator.reduce(counts, "sum") > 0).tolist()

    def described(self, loss: float) -> dict[str, float]:
        """The stage's further numbers of a step, averaged over the processes. All processes call it together."""
        found = self.stage.describe(loss)
        if self.world == 1 or not found:
            return found
        numbers = torch.tensor(list(found.values()), dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(found, self.accelerator.reduce(numbers, "mean").tolist(), strict=True))

    def _sized_parts(self, step: int) -> tuple[list[Batch], list[float], float]:
        """This process's micro-batches of a step, the weight of each (`Stage.size`), and the sum over all processes."""
        whole_student = self.sharding.gathered() if self.sharding and self.stage.writes else nullcontext()
        with whole_student, self.accelerator.autocast():
            parts = [self.stage.read(batch.to(self.accelerator.device)) for batch in self._parts(step)]
        sizes = [self.stage.size(part) for part in parts]
        whole = torch.tensor(sum(sizes), dtype=torch.float64, device=self.accelerator.device)
        return parts, sizes, self.accelerator.reduce(whole, "sum").item()

    def _reduced(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Average the gradients over processes. Returns the losses over all processes."""
        if self.world > 1:
            average_gradients({name: p for name, p in self.parameters.items() if not isinstance(p, DTensor)})
            sums = {name: self.accelerator.reduce(value, "sum") for name, value in sums.items()}
        if not sums:
            return {}
        return dict(zip(sums, torch.stack([value.float() for value in sums.values()]).tolist(), strict=True))

    def _parts(self, step: int) -> Iterator[Batch]:
        """Yield this process's micro-batches of a step."""
        share = self.batch // self.world
        first = self.first + step * self.batch + self.accelerator.process_index * share
        for offset in range(0, share, self.micro_batch):
            yield self.windows.batch(first + offset, min(self.micro_batch, share - offset))

    def _clip(self, step: int) -> float:
        gradients = {name: parameter.grad for name, parameter in self.parameters.items() if parameter.grad is not None}
        if self.sharding:
            return self._clip_parts(gradients, step)
        norm = torch.nn.utils.get_total_norm(gradients.values())
        if not math.isfinite(norm.item()):
            wrong = next((name for name, gradient in gradients.items() if not gradient.isfinite().all()), "all together")
            raise NonFinite(f"the gradient of {wrong} at step {step + 1} is not finite; try a lower lr or clip")
        if self.stage.options.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.stage.options.clip, norm)
        return norm.item()

    def _clip_parts(self, gradients: dict[str, Tensor], step: int) -> float:
        """As `_clip`, for whole and divided gradients together."""
        parts = {name: found.to_local() for name, found in gradients.items() if isinstance(found, DTensor)}
        whole = {name: found for name, found in gradients.items() if name not in parts}
        norm, clip = total_norm(whole, parts), self.stage.options.clip
        if not math.isfinite(norm.item()):
            wrong = first_nonfinite_name(whole, parts, sorted(self.parameters)) or "all together"
            raise NonFinite(f"the gradient of {wrong} at step {step + 1} is not finite; try a lower lr or clip")
        if clip is not None:
            factor = (clip / (norm + 1e-6)).clamp(max=1.0)
            for gradient in (*whole.values(), *parts.values()):
                gradient.mul_(factor)
        return norm.item()

    def _check(self, losses: dict[str, float], step: int) -> None:
        wrong = [name for name, loss in losses.items() if not math.isfinite(loss)]
        if wrong:
            whose = "the loss" if wrong == ["loss"] else f"the loss of {', '.join(wrong)}"
            blamed = self._blame(step)
            also = f"; {blamed}" if blamed else ""
            frozen = blamed is not None and blamed.startswith("the teacher")  # a lower lr does not help there
            fix = "choose another teacher, or precision=float32" if frozen else "try a lower lr"
            raise NonFinite(f"{whose} at step {step + 1} is {losses[wrong[0]]}{also}; {fix}")

    def _blame(self, step: int) -> str | None:
        """The stage's explanation of a loss that is not finite, searched one micro-batch at a time with the same weights."""
        if self.sharding:
            if self.sharding.teacher is not None:  # whole models would not fit one device
                return None
            self.sharding.restore()  # each process searches its own text independently
        with self.accelerator.autocast():
            found = (self.stage.blame(batch.to(self.accelerator.device)) for batch in self._parts(step))
            return next(filter(None, found), None)
