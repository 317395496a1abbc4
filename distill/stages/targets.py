"""Sources of next-token distributions for distillation: the run's teacher, another teacher, or a cache of logits.

A stage calls `see` with a batch, runs its student, and passes both results to `divergence` for the loss.
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
    """The source of distributions that a stage's options ask for.

    temperature: of both distributions. teacher: the reference of another teacher than the run's. offline: a folder of
    logits in place of a teacher. hidden, layers: whether hidden states are compared too, and the outputs of which layers.
    """

    temperature: float = 1.0
    teacher: str | None = None
    offline: str | None = None
    hidden: bool = False
    layers: tuple[int, ...] = ()


class Seen(NamedTuple):
    """A teacher's last hidden states for a batch, and the output states of some of its layers."""

    last: Float[Tensor, "b t e"]
    layers: dict[int, Float[Tensor, "b t e"]]


class Targets(ABC):
    """Base class of sources of next-token distributions. teacher: the model that runs for them; None if none does."""

    teacher: Teacher | None = None

    @abstractmethod
    def see(self, batch: Batch, layers: Sequence[int] = ()) -> Any:
        """The data for `divergence` on a batch. layers: also return the output states of these, if a teacher runs."""

    @abstractmethod
    def divergence(
        self, hidden: Float[Tensor, "b t d"], head: Head, seen: Any, batch: Batch, options: Any
    ) -> Float[Tensor, ""]:
        """The loss of a batch: a mean weighted by its `loss_weights`, 0 where these are all 0. options: has the stage's
        divergence, temperature and ce."""


class Online(Targets):
    """A teacher that runs together with the student.

    vocabulary: the number of entries in both softmaxes, where the two heads are padded to different numbers of rows.
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
    """A cache of logits from `distill cache`. The divergence is a lower bound of the KL (see `sparse_kl`)."""

    def __init__(self, cache: LogitCache) -> None:
        self.cache, self.vocabulary = cache, cache.facts.vocabulary

    def see(self, batch: Batch, layers: Sequence[int] = ()) -> Known:
        if batch.windows is None:
            raise ValueError("cached logits are looked up by window number, but this batch has no window numbers")
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
    """|ours - theirs|^2 / |theirs|^2 of each token, as a mean weighted by `weights` and over the pairs of states.

    The result is 0 where all weights are 0."""
    total = torch.zeros((), device=weights.device)
    for own, other in zip(ours, theirs, strict=True):
        wanted = other.float()
        power = torch.where(weights > 0, wanted.square().sum(-1), 1.0)  # the power may be 0 at a token of weight 0
        error = (own.float() - wanted).square().sum(-1) / power
        total = total + (error * weights).sum() / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return total / len(ours)
