"""Students whose kept attention is no longer the teacher's, and `replace` over them."""

import torch

from distill.build import build
from distill.stages.replace import Replace
from students.config import Layout
from tests.distill.stage_steps import calibration
from tests.teachers.tiny import CHECKPOINTS
from tests.teachers.tiny import tiny_teacher as published

MIXERS = {"M": {"mixer": "discrete_mamba2"}}
PLAIN = {"P": {"mixer": "attention"}}


def family_teacher(family):
    return published(CHECKPOINTS[family][0])


def trained(teacher, pattern="AAAM", mixers=MIXERS):
    """A student whose kept attention is no longer the teacher's."""
    student, transfers = build(teacher, Layout.over(teacher.n_layers, pattern, mixers))
    with torch.no_grad():
        for layer in range(teacher.n_layers):
            if student.layout.mixer_of(layer) is None:
                slot = getattr(student.get_submodule(student.place.layers)[layer], student.place.name)
                for parameter in slot.parameters():  # a memory of its own: the teacher's stays
                    parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    return student, transfers


def replaced(teacher, student, transfers, layout, text, **options):
    stage = Replace(teacher, student, Replace.Options(tokens=1, layers=[0], **options), transfers)
    stage.become(layout)
    stage.begin(calibration(text))
    return stage


def logits(student, text):
    with torch.no_grad():
        return student(input_ids=text.ids, document_ids=text.documents).logits
