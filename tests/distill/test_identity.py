"""A student with nothing swapped, and with plain attention swapped in, is its teacher; what makes it another is named."""

from dataclasses import replace

import pytest
import torch

from distill.build import build
from distill.errors import UserError
from distill.evaluation.identity import check_identity
from students.config import Layout
from tests.teachers.tiny import EVERY, tiny_teacher

SWAPPED = Layout.over(2, "M", {"M": {"mixer": "discrete_mamba2"}})


@pytest.mark.parametrize("name", EVERY)
def test_every_family_is_itself(name):
    found = check_identity(tiny_teacher(name), SWAPPED)
    assert found["logits"] < 1e-5 and found["attention"] < 1e-4 and found["layer"] in (0, 1)


def test_the_real_teacher(smollm2):
    kept = {0, 6, 7}
    layout = Layout("".join("A" if layer in kept else "M" for layer in range(30)), {"M": {"mixer": "mamba2"}})
    found = check_identity(smollm2, layout)
    assert found["logits"] < 1e-5 and found["attention"] < 1e-4 and found["layer"] not in kept


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("smollm2-135m-instruct", {"rope": "pairs"}),
        ("qwen3-0.6b", {"norm": "layer"}),
        ("qwen3-0.6b", {"norm_offset": 1.0}),
    ],
    ids=str,
)
def test_a_row_that_says_something_else_is_caught(name, row):
    teacher = tiny_teacher(name)
    teacher = replace(teacher, family=replace(teacher.family, **row))
    with pytest.raises(UserError, match=rf"layer 0 of {name} with plain attention in its place differs"):
        check_identity(teacher, SWAPPED)


def test_a_layer_that_is_another_is_named(monkeypatch):
    teacher = tiny_teacher("smollm2-135m-instruct")

    def other(teacher, layout):
        student, transfers = build(teacher, layout)
        up = student.model.layers[1].mlp.up_proj
        up.weight = torch.nn.Parameter(up.weight + 1.0)
        return student, transfers

    monkeypatch.setattr("distill.evaluation.identity.build", other)
    with pytest.raises(UserError, match=r"with nothing swapped is not its teacher: layer 1 differs"):
        check_identity(teacher, SWAPPED)


def test_a_head_that_is_another_is_named(monkeypatch):
    def other(teacher, layout):
        student, transfers = build(teacher, layout)
        student.lm_head.weight = torch.nn.Parameter(torch.randn_like(student.lm_head.weight))
        return student, transfers

    monkeypatch.setattr("distill.evaluation.identity.build", other)
    with pytest.raises(UserError, match="the final norm or the output head differs"):
        check_identity(tiny_teacher("smollm2-135m-instruct"), SWAPPED)


def test_what_was_given_no_value_is_named(monkeypatch):
    teacher = tiny_teacher("smollm2-135m-instruct")
    weights = teacher.model.state_dict
    monkeypatch.setattr(
        teacher.model, "state_dict", lambda: {name: part for name, part in weights().items() if "0.mlp.up" not in name}
    )
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj\.weight of a student of .* was given no value"):
        build(teacher, SWAPPED)
