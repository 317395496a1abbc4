"""The losses of every stage on one fixed held-out batch: what each stage lowered, and whether a checkpoint came back whole.

Each loss is measured from scratch (the orient scale and the align power come from the probe batch itself), so it depends
on the student's weights alone.
"""

import torch
from torch import nn

from distill.data import Batch
from distill.stages.align import Align
from distill.stages.imitate import Imitate
from distill.stages.orient import Orient
from distill.stages.stage import Stage
from teachers.teacher import Teacher

PROBED: dict[str, type[Stage]] = {"orient": Orient, "align": Align, "imitate": Imitate}


@torch.no_grad()
def probe(teacher: Teacher, student: nn.Module, batch: Batch) -> dict[str, float]:
    """Each stage's loss, and each layer's under `stage/layer_..`; a stage that none of the mixers has is left out."""
    found: dict[str, float] = {}
    for name, kind in PROBED.items():
        stage = kind(teacher, student, kind.Options(tokens=1, lr=1.0)).to(teacher.device)
        stage.begin(lambda tokens: [batch])
        losses = {layer: loss.item() for layer, loss in stage.losses(batch)}
        if losses:
            found[name] = sum(losses.values()) / len(losses)
            found.update({f"{name}/{layer}": loss for layer, loss in losses.items() if layer != "loss"})
    return found


def differs(before: dict[str, float], now: dict[str, float], tolerance: float) -> list[str]:
    """The stages whose loss is not what it was, relative to `tolerance`."""
    return [
        name
        for name in PROBED
        if name in before and name in now and abs(before[name] - now[name]) > tolerance * max(abs(before[name]), 1e-6)
    ]
