"""Held-out text with what the teacher makes of it: every student is compared on the same batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from distill.text.windows import Batch
from teachers.teacher import Teacher


@dataclass(frozen=True)
class Heldout:
    """Held-out batches on the teacher's device, with the teacher's last hidden states; made once a session."""

    batches: Sequence[Batch]
    hidden: Sequence[Float[Tensor, "_ t d"]]
    label_names: Sequence[str]

    @classmethod
    def of(cls, teacher: Teacher, batches: Sequence[Batch], label_names: Sequence[str]) -> "Heldout":
        """Run the teacher over the batches."""
        batches = [batch.to(teacher.device) for batch in batches]
        return cls(batches, [teacher.hidden(batch.ids, batch.positions) for batch in batches], label_names)

    def first(self, tokens: int) -> "Heldout":
        """As many of the batches as hold so many tokens."""
        count, total = 0, 0
        while count < len(self.batches) and total < tokens:
            total += self.batches[count].tokens
            count += 1
        return Heldout(self.batches[:count], self.hidden[:count], self.label_names)
