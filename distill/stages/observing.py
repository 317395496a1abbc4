"""Inputs and outputs of the teacher's attention layers, with the context for their mixers, for layer-by-layer stages."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch

from distill.text.windows import Batch
from students.mixers.mixer import Context, Mixer
from students.mixers.sharing import SharedKeys
from teachers.observe import Observation
from teachers.teacher import Teacher


@runtime_checkable
class Sites(Protocol):
    """A holder of mixers by layer and of who shares whose keys: a student, or mixers that are not in a student yet."""

    @property
    def mixers(self) -> Mapping[int, Mixer]:
        """The mixers by layer."""
        ...

    @property
    def givers(self) -> Mapping[int, int]:
        """For each layer that uses another layer's keys and values, that other layer."""
        ...


def observed(
    teacher: Teacher,
    student: Sites,
    batch: Batch,
    layers: Sequence[int],
    qkv: bool = False,
    wide: bool = False,
) -> Iterator[tuple[Observation, Context]]:
    """Run the teacher once and yield, for each of these layers, its observation and the context for its mixer.

    A mixer that uses an earlier layer's keys and values gets those that the earlier mixer makes from its own layer's input.
    They are constants, so each layer's loss trains its own mixer alone.

    Args:
        wide: float32 observations whatever the type of the teacher, for closed-form solutions. Without autocast they are
            always float32, because the mixers' own parameters are.
    """
    wide = wide or not torch.is_autocast_enabled(batch.ids.device.type)
    givers = {layer: student.givers[layer] for layer in layers if layer in student.givers}
    shared = {giver: SharedKeys() for giver in givers.values()}
    for seen in teacher.observe(batch.ids, batch.positions, sorted({*layers, *shared}), qkv=qkv):
        seen = seen.wide() if wide else seen
        context = Context(documents=batch.documents, rope=seen.rope)
        if seen.layer in shared:
            student.mixers[seen.layer].project(seen.input, replace(context, shared=shared[seen.layer]))
            shared[seen.layer].detach()
        if seen.layer in layers:
            giver = givers.get(seen.layer)
            yield seen, context if giver is None else replace(context, shared=shared[giver])


def layer_name(layer: int) -> str:
    """The name of a layer in metrics."""
    return f"layer_{layer:02d}"
