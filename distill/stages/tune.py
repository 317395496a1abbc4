"""Stage tune: supervised fine-tuning (SFT) with cross-entropy on the assistant's answers, or on all tokens of plain text.

With `kl`, a divergence from the teacher is added: cross-entropy + kl T^2 D(teacher, student). Both terms are means over the
tokens that are trained on.
"""

from collections.abc import Iterator
from typing import Annotated, NamedTuple

from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from distill.output_head import head_of
from distill.ranges import Range
from distill.stages.likelihood import cross_entropy
from distill.stages.targets import Source
from distill.stages.whole import TaughtOptions, WholeStudent
from distill.text.windows import Batch
from teachers.teacher import Teacher


class Shares(NamedTuple):
    """The options that `Targets.divergence` reads."""

    divergence: str
    temperature: float
    ce: float


class Tune(WholeStudent):
    """Supervised fine-tuning: cross-entropy on the assistant's answers; `kl` adds a divergence from a teacher."""

    class Options(TaughtOptions):
        """Options of supervised fine-tuning. Cross-entropy is on the assistant's answers, or on all tokens of plain text."""

        kl: Annotated[float, Range(0, 1e6)] = 0.0
        """Weight of the divergence from the teacher; cross-entropy has weight 1. At 0 no teacher runs."""

        @model_validator(mode="after")
        def _targets_are_used(self) -> "Tune.Options":
            for name in ("teacher", "offline_logits"):
                if getattr(self, name) is not None and not self.kl:
                    raise ValueError(f"{name} is given, but its weight, kl, is 0; give kl a weight, or leave {name} out")
            if self.offline_logits is not None and self.divergence != "forward_kl":
                raise ValueError(
                    f"divergence is {self.divergence!r}, but offline_logits bound the forward KL and no other divergence; "
                    "set divergence: forward_kl, or leave offline_logits out"
                )
            return self

    options: Options

    @classmethod
    def runs(cls, options: "Tune.Options") -> bool:
        return options.kl > 0

    @classmethod
    def source(cls, options: "Tune.Options") -> Source | None:
        return Source(options.temperature, options.teacher, options.offline_logits) if options.kl else None

    @property
    def running(self) -> Teacher | None:
        return self.targets.teacher if self.options.kl else None

    def losses(self, batch: Batch) -> Iterator[tuple[str, Float[Tensor, ""]]]:
        options, student = self.options, self.student
        seen = self.targets.see(batch) if options.kl else None
        hidden = student.hidden(batch.ids, batch.documents)
        if not options.kl:
            yield "loss", cross_entropy(hidden, head_of(student), batch)
            return
        both = 1.0 + options.kl  # the sum of both weights: cross-entropy has the share 1 / both
        shares = Shares(options.divergence, options.temperature, 1.0 / both)
        yield "loss", both * self.targets.divergence(hidden, head_of(student), seen, batch, shares)
