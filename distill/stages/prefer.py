"""Stage prefer: direct preference optimisation (DPO, arXiv 2305.18290) on pairs of a chosen and a rejected answer.

With r = log p_student(answer) - log p_reference(answer), summed over the answer's tokens, and d = r(chosen) - r(rejected):

    sigmoid   -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)         e: label_smoothing (conservative DPO)
    ipo       (d' - 1 / (2 beta))^2, d' from r divided by the number of the answer's tokens
              (arXiv 2310.12036; TRL >= 1.16 averages in this way)

The reference's log-probabilities are computed before the first step (`distill.training.references`), so no other model runs
during training. A pair is two consecutive windows: chosen, then rejected.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from distill.output_head import head_of, trimmed
from distill.ranges import Range
from distill.recipe import TextSource
from distill.stages.likelihood import sequence_log_probabilities
from distill.stages.stage import Transfers
from distill.stages.targets import Online, Source
from distill.stages.whole import WholeOptions, WholeStudent
from distill.text.windows import Batch
from students.skeleton import Student
from teachers.teacher import Teacher


class Prefer(WholeStudent):
    """Direct preference optimisation on pairs of a chosen and a rejected answer (DPO, arXiv 2305.18290)."""

    needs_teacher = False
    text = "pairs"

    class Options(WholeOptions):
        """Options of direct preference optimisation. `batch` and `micro_batch` count windows; a pair is two."""

        data: Annotated[list[TextSource], Field(min_length=1)] | None = None
        """Sources of pairs. Required: no other stage reads pairs. See docs/text.md#pairs."""
        loss: Literal["sigmoid", "ipo"] = "sigmoid"
        """`sigmoid`: the loss of DPO on summed log-probabilities. `ipo`: the squared loss of arXiv 2310.12036 on means
        over each answer's tokens."""
        beta: Annotated[float, Range(0, 1e3, above=True)] = 0.1
        """Strength of the pull to the reference: the beta of DPO."""
        label_smoothing: Annotated[float, Range(0, 0.5, below=True)] = 0.0
        """Assumed share of pairs whose answers are swapped (conservative DPO). Only for `sigmoid`."""
        reference: Literal["student", "teacher"] = "student"
        """The reference model: the `student` as it is when the stage begins, or the `teacher`. Its log-probabilities of the
        pairs are computed once and kept in the run folder."""
        teacher: Annotated[str, Field(min_length=1)] | None = None
        """Another model as the reference, in place of the run's teacher; it must have the same vocabulary. Only with
        `reference: teacher`."""

        @model_validator(mode="after")
        def _pairs(self) -> "Prefer.Options":
            if self.data is None:
                raise ValueError("data is missing: this stage reads pairs (prompt, chosen, rejected); name their sources")
            if self.teacher is not None and self.reference != "teacher":
                raise ValueError(
                    f"teacher is given, but reference is {self.reference!r}; set reference: teacher, or leave teacher out"
                )
            if self.label_smoothing and self.loss == "ipo":
                raise ValueError(f"label_smoothing is {self.label_smoothing}, but loss: ipo has no smoothing; leave it out")
            for source in self.data:
                if source.train_on is not None:
                    raise ValueError(
                        f"train_on is {source.train_on!r}, but pairs are always trained on their answers; leave it out"
                    )
            return self

    options: Options

    def __init__(
        self, teacher: Teacher, student: Student, options: "Prefer.Options", transfers: Transfers | None = None
    ) -> None:
        super().__init__(teacher, student, options, transfers)
        self._known: Float[Tensor, " w"] | None = None
        self._held: list[Batch] = []
        self._margins: list[Float[Tensor, " p"]] = []

    @classmethod
    def source(cls, options: "Prefer.Options") -> Source | None:
        return Source(teacher=options.teacher) if options.teacher else None

    @classmethod
    def reads_before(cls, options: "Prefer.Options") -> Literal["student", "teacher"]:
        return options.reference

    @property
    def running(self) -> Teacher | None:
        return None

    def refer_to(self, known: Float[Tensor, " w"], held: list[Batch]) -> None:
        """Take the reference's log-probabilities.

        Args:
            known: the log-probability of each window's answer, by window number. held: held-out batches of pairs.
        """
        self._known, self._held = known, held
        self.targets = Online(self.teacher)  # drops the only reference to another teacher and frees its memory

    @torch.no_grad()
    def reference_log_probabilities(self, batch: Batch) -> Float[Tensor, " b"]:
        """The reference's log-probability of each window's answer. Call it before the first step: `reference: student` means
        the student as it is then."""
        if self.options.reference == "student":
            return sequence_log_probabilities(self.student.hidden(batch.ids, batch.documents), head_of(self.student), batch)
        targets = cast(Online, self.targets)
        model, vocabulary = targets.teacher, targets.vocabulary
        head = head_of(model.model)
        head = head if vocabulary is None else trimmed(head, vocabulary)
        return sequence_log_probabilities(model.hidden(batch.ids, batch.positions), head, batch)

    def losses(self, batch: Batch) -> Iterator[tuple[str, Float[Tensor, ""]]]:
        options, ratios = self.options, self._ratios(batch)
        margins = options.beta * (ratios[0::2] - ratios[1::2])
        self._margins.append(margins.detach())
        if options.loss == "ipo":
            means = ratios / batch.loss_weights.sum(-1).clamp_min(1.0)
            found = (means[0::2] - means[1::2] - 1.0 / (2.0 * options.beta)).square()
        else:
            smoothing = options.label_smoothing
            found = -(1.0 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)
        yield "loss", found.mean()

    def _ratios(self, batch: Batch) -> Float[Tensor, " b"]:
        """log p_student - log p_reference of each window's answer."""
        ours = sequence_log_probabilities(self.student.hidden(batch.ids, batch.documents), head_of(self.student), batch)
        if batch.windows is None:  # a batch that only measures memory has no reference
            return ours
        theirs = cast(Tensor, self._known)[batch.windows].to(ours)
        if not theirs.isfinite().all():
            raise ValueError("the reference's log-probabilities of these windows were not computed")
        return ours - theirs

    def size(self, batch: Batch) -> float:
        return batch.ids.shape[0] / 2

    def describe(self, loss: float) -> dict[str, float]:
        margins, self._margins = self._margins, []
        return _said(torch.cat(margins)) if margins else {}

    @torch.no_grad()
    def measured(self) -> dict[str, float]:
        if not self._held:
            return {}
        ratios = torch.cat([self._ratios(batch) for batch in self._held])
        margins = self.options.beta * (ratios[0::2] - ratios[1::2])
        return {"pairs": len(margins), **_said(margins)}


def _said(margins: Float[Tensor, " p"]) -> dict[str, float]:
    """The mean margin of rewards beta r, chosen less rejected, and the share of pairs in which it is positive."""
    return {"reward_margin": margins.mean().item(), "win_share": (margins > 0).float().mean().item()}
