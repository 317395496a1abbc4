"""Held-out batches with the teacher's hidden states on them: every student is compared on the same batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.text.windows import Batch
from teachers.teacher import Teacher


class Hidden(Sequence):
    """A teacher's last hidden states on batches, each computed when it is first read, in the autocast precision in which
    this object was made."""

    def __init__(self, teacher: Teacher, batches: Sequence[Batch]) -> None:
        kind = teacher.device.type
        self.teacher, self.batches = teacher, batches
        self._precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._made: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        if place not in self._made:
            batch, kind = self.batches[place], self.teacher.device.type
            with torch.autocast(kind, self._precision, enabled=self._precision is not None):
                self._made[place] = self.teacher.hidden(batch.ids, batch.positions)
        return self._made[place]


@dataclass(frozen=True)
class Heldout:
    """Held-out batches on the teacher's device, with the teacher's last hidden states; made once a session.

    documents: the number of each token's document in the text, negative for padding; None where it is not needed.
    """

    batches: Sequence[Batch]
    hidden: "Sequence[Float[Tensor, '_ t d']] | Hidden"
    label_names: Sequence[str]
    documents: Sequence[Int[Tensor, "_ t"]] | None = None

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        batches: Sequence[Batch],
        label_names: Sequence[str],
        documents: Sequence[Int[Tensor, "_ t"]] | None = None,
        at_once: bool = True,
    ) -> "Heldout":
        """Run the teacher on the batches: on all of them now (`at_once`), or on each when its hidden states are first read,
        for example where several processes read a share each."""
        hidden = Hidden(teacher, [batch.to(teacher.device) for batch in batches])
        return cls(hidden.batches, list(hidden) if at_once else hidden, label_names, documents)

    def first(self, tokens: int) -> "Heldout":
        """The first batches, as many as hold `tokens` tokens."""
        count, total = 0, 0
        while count < len(self.batches) and total < tokens:
            total += self.batches[count].tokens
            count += 1
        documents = None if self.documents is None else self.documents[:count]
        return Heldout(self.batches[:count], self.hidden[:count], self.label_names, documents)
