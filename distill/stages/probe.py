"""The probe: each stage's loss on one fixed held-out batch.

It shows which losses a stage lowered, and whether a checkpoint was restored exactly. Each loss is measured from scratch
(the orient scale and the align power come from the probe batch itself), so it depends on the student's weights alone.
"""

import math

import torch

from distill.stages import STAGES, stage_class
from distill.stages.stage import LayerLoss, Stage
from distill.text.windows import Batch
from students.skeleton import Student
from teachers.teacher import Teacher


def probed_stages() -> dict[str, type[Stage]]:
    """The stages of the table whose losses are probed."""
    return {name: kind for name in STAGES if (kind := stage_class(name)).probed}


@torch.no_grad()
def probe(teacher: Teacher, student: Student, batch: Batch) -> dict[str, float]:
    """Each stage's loss, and each layer's as `stage/layer_..`. A stage that trains none of the mixers is left out."""
    found: dict[str, float] = {}
    for name, kind in probed_stages().items():
        stage = kind(teacher, student, kind.probe_options()).to(teacher.device)
        stage.begin(lambda tokens: [batch])
        losses = {layer: loss.item() for layer, loss in stage.losses(batch)}
        if losses:
            found[name] = sum(losses.values()) / len(losses)
            found.update({f"{name}/{layer}": loss for layer, loss in losses.items() if layer != "loss"})
    return found


def judged_layer_loss() -> tuple[str, LayerLoss]:
    """The stage whose losses by layer are part of every evaluation, and how they are shown."""
    return next(
        (name, kind.layer_loss) for name, kind in probed_stages().items() if kind.layer_loss and kind.layer_loss.judged
    )


def judged_layer_errors(probed: dict[str, float]) -> dict[str, float]:
    """The error of each layer's mixer, from that stage's losses on the probe batch."""
    stage, how = judged_layer_loss()
    losses = {name: loss for name, loss in probed.items() if name.startswith(f"{stage}/")}
    return {name.partition("/")[2]: how.shown(loss) for name, loss in losses.items()}


def differs(before: dict[str, float], now: dict[str, float], tolerance: float) -> list[str]:
    """The stages whose loss changed by more than `tolerance`, relative to the earlier one."""

    def same(name: str) -> bool:  # False for nan
        return abs(before[name] - now[name]) <= tolerance * max(abs(before[name]), 1e-6)

    return [name for name in probed_stages() if name in before and name in now and not same(name)]


def finite(losses: dict[str, float]) -> dict[str, float]:
    """The losses of a probe that are finite, which can be written as JSON."""
    return {name: loss for name, loss in losses.items() if math.isfinite(loss)}
