"""Held-out text with what the teacher makes of it: every student is compared on the same batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from distill.text.windows import Batch
from teachers.teacher import Teacher


@dataclass(frozen=True)
class Heldout:
    """Held-out batches on the teacher's device, with the teacher's last hidden states; made once a session.

    documents: the number of each token's document in the text, negative where it counts for nothing; None where nobody asks
    for it.
    """

    batches: Sequence[Batch]
    hidden: Sequence[Float[Tensor, "_ t d"]]
    label_names: Sequence[str]
    documents: Sequence[Int[Tensor, "_ t"]] | None = None

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        batches: Sequence[Batch],
        label_names: Sequence[str],
        documents: Sequence[Int[Tensor, "_ t"]] | None = None,
    ) -> "Heldout":
        """Run the teacher over the batches."""
        batches = [batch.to(teacher.device) for batch in batches]
        return cls(batches, [teacher.hidden(batch.ids, batch.positions) for batch in batches], label_names, documents)

    def first(self, tokens: int) -> "Heldout":
        """As many of the batches as hold so many tokens."""
        count, total = 0, 0
        while count < len(self.batches) and total < tokens:
            total += self.batches[count].tokens
            count += 1
        documents = None if self.documents is None else self.documents[:count]
        return Heldout(self.batches[:count], self.hidden[:count], self.label_names, documents)
