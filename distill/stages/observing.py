"""What a layer-local stage looks at: the teacher's layers, and what their mixers know when they are fed the same."""

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
    """What holds mixers by layer, and the layers whose keys others share: a student, or mixers that stand in none yet."""

    @property
    def mixers(self) -> Mapping[int, Mixer]:
        """The mixers by layer."""
        ...

    @property
    def givers(self) -> Mapping[int, int]:
        """For each layer that shares keys, the layer whose they are."""
        ...


def observed(
    teacher: Teacher,
    student: Sites,
    batch: Batch,
    layers: Sequence[int],
    qkv: bool = False,
    wide: bool = False,
) -> Iterator[tuple[Observation, Context]]:
    """What some of the teacher's layers see and do, and what their mixers know when they are fed the same.

    A mixer that shares an earlier layer's keys and values gets those that the other's mixer makes of that layer's own
    input, as constants: each layer's loss trains its own mixer alone.

    Args:
        wide: in float32 whatever the teacher is held in, for what is solved in closed form. Without autocast everything is:
            a mixer's own numbers are float32.
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
    """How metrics call a layer."""
    return f"layer_{layer:02d}"
