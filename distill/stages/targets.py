"""Where a stage that distils next-token distributions gets them from: the run's teacher, another one, or a cache of logits.

A stage asks `see` for what is known of a batch, runs its student, and asks `divergence` for the loss between the two.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.logits.reader import Known, LogitCache
from distill.output_head import head_of, trimmed
from distill.stages.layer_states import recorded
from distill.text.windows import Batch
from students.kernels.linear_kl import Head, linear_kl, sparse_kl
from teachers.teacher import Teacher


@dataclass(frozen=True)
class Source:
    """What a stage's options say of where its distributions come from: at which temperature they are compared, the reference
    of another teacher than the run's, a folder of logits in place of a teacher, and whether hidden states are compared too,
    and of which layers."""

    temperature: float = 1.0
    teacher: str | None = None
    offline: str | None = None
    hidden: bool = False
    layers: tuple[int, ...] = ()


class Seen(NamedTuple):
    """A teacher's last hidden states of a batch, and the output states of some of its layers."""

    last: Float[Tensor, "b t e"]
    layers: dict[int, Float[Tensor, "b t e"]]


class Targets(ABC):
    """One source of next-token distributions. teacher: the model that runs for them; None where none does."""

    teacher: Teacher | None = None

    @abstractmethod
    def see(self, batch: Batch, layers: Sequence[int] = ()) -> Any:
        """What `divergence` needs of a batch. layers: whose output states are wanted too, where a teacher runs."""

    @abstractmethod
    def divergence(
        self, hidden: Float[Tensor, "b t d"], head: Head, seen: Any, batch: Batch, options: Any
    ) -> Float[Tensor, ""]:
        """The loss of a batch, a mean over its `loss_weights`; 0 where these are all 0. options: the stage's divergence,
        temperature and ce."""


class Online(Targets):
    """A teacher that runs beside the student.

    vocabulary: entries that the softmaxes are over, where the two heads have other numbers of unused rows behind it.
    """

    teacher: Teacher

    def __init__(self, teacher: Teacher, vocabulary: int | None = None) -> None:
        self.teacher, self.vocabulary = teacher, vocabulary

    def see(self, batch: Batch, layers: Sequence[int] = ()) -> Seen:
        teacher = self.teacher
        modules = cast(nn.ModuleList, teacher.model.get_submodule(teacher.family.layers))
        with recorded({layer: modules[layer] for layer in layers}) as states:
            last = teacher.hidden(batch.ids, batch.positions)
        return Seen(last, states)

    def divergence(
        self, hidden: Float[Tensor, "b t d"], head: Head, seen: Any, batch: Batch, options: Any
    ) -> Float[Tensor, ""]:
        theirs = head_of(self.teacher.model)
        if self.vocabulary is not None:
            head, theirs = trimmed(head, self.vocabulary), trimmed(theirs, self.vocabulary)
        return linear_kl(
            hidden.flatten(0, 1),
            head,
            seen.last.flatten(0, 1).to(hidden.dtype),
            theirs,
            batch.loss_weights.flatten(),
            batch.targets.flatten() if options.ce else None,
            divergence=options.divergence,
            temperature=options.temperature,
            ce_weight=options.ce,
        )


class Cached(Targets):
    """Logits that `distill cache` wrote. The divergence is a lower bound of the KL (`students.kernels.linear_kl.sparse`)."""

    def __init__(self, cache: LogitCache) -> None:
        self.cache, self.vocabulary = cache, cache.facts.vocabulary

    def see(self, batch: Batch, layers: Sequence[int] = ()) -> Known:
        if batch.windows is None:
            raise ValueError("cached logits are known by their windows, and this batch does not say which it holds")
        return self.cache.known(batch.windows.tolist()).to(batch.ids.device)

    def divergence(
        self, hidden: Float[Tensor, "b t d"], head: Head, seen: Any, batch: Batch, options: Any
    ) -> Float[Tensor, ""]:
        ids, logs, rest = (tensor.flatten(0, 1) for tensor in seen)
        return sparse_kl(
            hidden.flatten(0, 1),
            trimmed(head, self.vocabulary),
            ids,
            logs,
            rest,
            batch.loss_weights.flatten(),
            batch.targets.flatten() if options.ce else None,
            temperature=options.temperature,
            ce_weight=options.ce,
        )


def relative_error(
    ours: Sequence[Float[Tensor, "b t d"]], theirs: Sequence[Float[Tensor, "b t d"]], weights: Float[Tensor, "b t"]
) -> Float[Tensor, ""]:
    """|ours - theirs|^2 / |theirs|^2 of each token, mean over the tokens that count, and over the pairs of states; 0 where
    none counts."""
    total = torch.zeros((), device=weights.device)
    for own, other in zip(ours, theirs, strict=True):
        wanted = other.float()
        power = torch.where(weights > 0, wanted.square().sum(-1), 1.0)  # a token that counts for nothing may have none
        error = (own.float() - wanted).square().sum(-1) / power
        total = total + (error * weights).sum() / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return total / len(ours)
