"""Stage 2, align: hidden-state alignment of each mixer's output with its attention's output (MOHAWK, section 4.2).

The mixers get the teacher's own inputs. One teacher pass serves all layers, which are independent: each layer's graph is
freed before the next one's is built. The loss of a layer is |y - a|^2 (y: mixer output, a: attention output) over the mean
|a|^2 of that layer, so all layers have equal weight. Its root is the relative L2 error. MOHAWK and RADLADS average
unsquared norms of whole blocks' or mixers' outputs; the square keeps sums over tokens additive. Every token of a document
counts, in chats those of the user too: the mixer has to replace attention on all of them.

After `replace`, the stage trains the new mixers alone by default. The others have since been distilled with the student as a
whole. Fitting them to the teacher's layers again, on the teacher's inputs, would undo how they adapted to each other.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from distill.schema import Count
from distill.stages.observing import layer_name, observed
from distill.stages.rates import Point
from distill.stages.stage import LayerLoss, Stage, TrainingOptions, Transfers
from distill.text.windows import Batch, Calibration
from students.skeleton import Student
from teachers.teacher import Teacher


class Align(Stage):
    """Hidden-state alignment: fits each mixer's output to its attention's output, on the teacher's inputs (MOHAWK, stage 2).

    All mixers are trained at once."""

    probed = True
    layer_loss = LayerLoss("output against attention's", "relative L2 error", squared=True, judged=True)
    rates = (
        Point(134.5e6, 155_375, "smollm2-135m_mamba2-hybrid, 16 windows (docs/performance.md)"),
        Point(1236e6, 88_105, "llama-3.2-1b_mamba2-hybrid, 8 windows at a time"),
        Point(8030e6, 17_436, "llama-3-8b_mamba-in-llama, 4 windows at a time"),
    )

    class Options(TrainingOptions):
        """Options of hidden-state alignment."""

        calibration_tokens: Count = 8192
        """Tokens of text on which the power of each layer's output is measured."""
        layers: Literal["new", "all"] = "new"
        """Which mixers are trained: `all`, or only the `new` ones that the last `initialise` or `replace` made."""

    options: Options
    power: Tensor

    def __init__(
        self, teacher: Teacher, student: Student, options: "Align.Options", transfers: Transfers | None = None
    ) -> None:
        super().__init__(teacher, student, options, transfers)
        self.aligned = self.trained_layers(student, options)
        self.register_buffer("power", torch.ones(teacher.n_layers))

    @torch.no_grad()
    def begin(self, calibration: Calibration) -> None:
        total, tokens = torch.zeros_like(self.power), 0
        for batch in calibration(self.options.calibration_tokens):
            for seen in self.teacher.observe(batch.ids, batch.positions, self.aligned):
                total[seen.layer] += seen.output.float().square().sum()
            tokens += batch.tokens
        self.power.copy_(torch.where(total > 0, total / tokens, torch.ones_like(total)))

    @classmethod
    def probe_options(cls) -> "Align.Options":
        return cls.Options(tokens=1, lr=1.0, layers="all")

    def losses(self, batch: Batch) -> Iterator[tuple[str, Float[Tensor, ""]]]:
        for seen, context in observed(self.teacher, self.student, batch, self.aligned):
            y = self.student.mixers[seen.layer](seen.input, context)
            error = _mean((y.float() - seen.output.float()).square().sum(-1), batch)
            yield layer_name(seen.layer), error / self.power[seen.layer]

    def size(self, batch: Batch) -> float:
        return batch.tokens if batch.trained is None else (batch.labels >= 0).sum().item()

    def describe(self, loss: float) -> dict[str, float]:
        return {"relative_l2": loss**0.5}


def _mean(errors: Float[Tensor, "b t"], batch: Batch) -> Float[Tensor, ""]:
    """The mean over the tokens of documents, without the padding in windows of chats."""
    if batch.trained is None:
        return errors.mean()
    real = batch.labels >= 0
    return (errors * real).sum() / real.sum().clamp_min(1)
