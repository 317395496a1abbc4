"""The loss of a teacher by quantisation: its KL from, and top-1 agreement with, its original weights on held-out text."""

import torch

from distill.division import divided
from distill.evaluation.fidelity import CHUNK
from distill.output_head import wide_head, wide_logits
from distill.text.heldout import Heldout
from students.kernels.linear_kl.reference import forward_kl
from teachers.teacher import Teacher


@torch.no_grad()
def quantisation_loss(teacher: Teacher, heldout: Heldout) -> dict[str, float]:
    """Return KL(original || quantised) in nats a token, the top-1 agreement, and the number of tokens.

    Args:
        heldout: the text, with the hidden states of the quantised teacher.
    """
    head = wide_head(teacher.model)

    def sums(index: int) -> list[float]:
        batch, hidden, totals = heldout.batches[index], heldout.hidden[index], torch.zeros(3, dtype=torch.float64)
        with teacher.as_it_was():
            wanted = teacher.hidden(batch.ids, batch.positions)
        pieces = (part.flatten(0, batch.ids.dim() - 1).split(CHUNK) for part in (wanted, hidden, batch.weights))
        for before, after, counts in zip(*pieces, strict=True):
            known, found = (wide_logits(part, head).log_softmax(-1) for part in (before, after))
            rows = torch.stack([forward_kl(found, known), known.argmax(-1) == found.argmax(-1), torch.ones_like(counts)])
            totals += (rows.double() * counts).sum(1).cpu()
        return totals.tolist()

    kl, same, weight = (sum(part) for part in zip(*divided(range(len(heldout.batches)), sums), strict=True))
    return {"kl": kl / weight, "agreement": same / weight, "tokens": int(weight)}


def told_of(found: dict[str, float]) -> str:
    """Describe the result of `quantisation_loss` in one line."""
    return (
        f"in int8 the teacher's KL from itself in bfloat16 is {found['kl']:.2g} nats a token, and its top-1 agreement is "
        f"{found['agreement']:.1%} of {found['tokens']:,} held-out tokens"
    )
