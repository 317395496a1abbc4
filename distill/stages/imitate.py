"""Stage 3, imitate: end-to-end knowledge distillation of the student on the teacher's next-token distribution.

The loss is the forward KL by default. It is computed from the last hidden states of both models through both heads in
chunks, so the logits of a batch never exist at once. In chats every loss, that of hidden states too, is a mean over the
tokens that are trained on. MOHAWK trains every weight in this stage at a low rate; here `train` says what is trained, and
`lr` may give each role its own rate. Meta tokens take part from this stage on: the stages before feed each mixer the
teacher's own inputs, which have none.
"""

from collections.abc import Iterator
from typing import Annotated, cast

from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from distill.output_head import head_of
from distill.ranges import SHARE, Range, whole
from distill.stages.layer_states import recorded
from distill.stages.on_policy import written
from distill.stages.rates import Point
from distill.stages.stage import Transfers
from distill.stages.targets import Source, relative_error
from distill.stages.whole import TaughtOptions, WholeStudent
from distill.text.windows import Batch
from students.skeleton import Student
from teachers.teacher import Teacher


class Imitate(WholeStudent):
    """End-to-end knowledge distillation: fits the student's next-token distribution to the teacher's (MOHAWK, stage 3)."""

    probed = True
    rates = (
        Point(134.5e6, 69_709, "smollm2-135m_mamba2-hybrid, 8 windows at a time (docs/performance.md)"),
        Point(596e6, 55_297, "qwen3-0.6b_mamba2-hybrid, 32 windows a step"),
        Point(1236e6, 30_282, "llama-3.2-1b_mamba2-hybrid, 8 windows at a time, layers recomputed"),
        Point(8030e6, 7_124, "llama-3-8b_mamba-in-llama, 4 windows at a time, layers recomputed, mixers and norms"),
    )

    class Options(TaughtOptions):
        """Options of end-to-end knowledge distillation."""

        on_policy: Annotated[float, SHARE] = 0.0
        """Share of the windows, drawn at each step, in which the student writes the answers before the teacher scores them
        (GKD, arXiv 2306.13649). The student samples at temperature 1, at most as many tokens as it replaces: the first
        answer of a chat and everything after it. Not with `ce` or `offline_logits`."""
        ce: Annotated[float, SHARE] = 0.0
        """Share of plain cross-entropy in the loss; the divergence has the rest."""
        hidden: Annotated[float, Range(0, 1e6)] = 0.0
        """Weight of the relative squared error of hidden states: the mean over the last hidden state and the outputs of
        `hidden_layers`. See docs/teachers.md#hidden-states."""
        hidden_layers: list[Annotated[int, whole(0, 65_536)]] = []
        """Layers, numbered from 0, whose outputs are compared too. Another `teacher` must have as many layers."""
        scale: Annotated[float, Range(0, 1e9, above=True)] = 1.0
        """Factor of the whole loss, which is a mean over tokens. It reproduces published recipes whose loss is a sum over
        tokens: their gradient clipping and AdamW's epsilon are set for the larger loss."""

        @model_validator(mode="after")
        def _targets_fit(self) -> "Imitate.Options":
            if self.offline_logits is not None and self.divergence != "forward_kl":
                raise ValueError(
                    f"divergence is {self.divergence!r}, but offline_logits hold only a teacher's likeliest tokens, which "
                    "bound the forward KL and no other divergence; set divergence: forward_kl, or leave offline_logits out"
                )
            if self.on_policy and (self.offline_logits is not None or self.ce):
                what = f"ce is {self.ce}, and would train it on" if self.ce else "offline_logits hold nothing for"
                raise ValueError(
                    f"on_policy is {self.on_policy}: the student writes answers, and {what} its own words; leave one of "
                    "the two out"
                )
            if self.offline_logits is not None and self.hidden:
                raise ValueError(
                    f"hidden is {self.hidden}, and offline_logits hold no hidden states; set hidden: 0, or leave "
                    "offline_logits out"
                )
            if self.hidden_layers and not self.hidden:
                raise ValueError(
                    f"hidden_layers is {self.hidden_layers}, but its weight, hidden, is 0; give hidden a weight"
                )
            if len(set(self.hidden_layers)) != len(self.hidden_layers):
                raise ValueError(f"hidden_layers is {self.hidden_layers}, which names a layer twice")
            return self

    options: Options

    def __init__(
        self, teacher: Teacher, student: Student, options: "Imitate.Options", transfers: Transfers | None = None
    ) -> None:
        super().__init__(teacher, student, options, transfers)
        self.writes = options.on_policy > 0

    @classmethod
    def source(cls, options: "Imitate.Options") -> Source:
        layers = tuple(options.hidden_layers)
        return Source(options.temperature, options.teacher, options.offline_logits, options.hidden > 0, layers)

    def read(self, batch: Batch) -> Batch:
        return written(batch, self.student, self.options.on_policy) if self.writes else batch

    def losses(self, batch: Batch) -> Iterator[tuple[str, Float[Tensor, ""]]]:
        options, student = self.options, self.student
        seen = self.targets.see(batch, options.hidden_layers)
        layers = cast(nn.ModuleList, student.get_submodule(student.place.layers))
        with recorded({layer: layers[layer] for layer in options.hidden_layers}, lambda: student.text_columns) as states:
            hidden = student.hidden(batch.ids, batch.documents)
        loss = self.targets.divergence(hidden, head_of(student), seen, batch, options)
        if options.hidden:
            ours, theirs = [hidden], [seen.last]
            for layer in options.hidden_layers:
                ours.append(states[layer])
                theirs.append(seen.layers[layer])
            loss = loss + options.hidden * relative_error(ours, theirs, batch.loss_weights)
        yield "loss", options.scale * loss

    def describe(self, loss: float) -> dict[str, float]:
        options = self.options
        if options.offline_logits is None or options.ce:
            return {}
        return {"kl_lower_bound": loss / options.scale / options.temperature**2}

    @classmethod
    def check(cls, student: Student, options: "Imitate.Options", last: bool) -> None:
        count = len(student.layout.pattern)
        if beyond := [layer for layer in options.hidden_layers if layer >= count]:
            raise ValueError(f"hidden_layers names layer {beyond[0]}, and the model has the layers 0 to {count - 1}")
        super().check(student, options, last)
