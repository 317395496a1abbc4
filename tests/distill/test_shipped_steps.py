"""Every shipped recipe takes two steps of each of its stages, on a tiny random teacher of its own family."""

import re

import pytest
import torch
from transformers import AutoConfig

from distill.build import build, layout_of
from distill.data import Batch
from distill.optim import make_optimizer
from distill.recipe import load, shipped_folder
from distill.stages import stage_class
from tests.teachers.tiny import tiny_teacher

NAMES = sorted(path.stem for path in shipped_folder().glob("*.yaml"))


def teacher_of(recipe):
    """Of the same family and twice the pattern deep; as deep, and of as many heads, as published where heads are named."""
    name = re.sub(r"([.-]q\d\w*)?\.gguf$", "", recipe.teacher.rpartition("/")[2].lower())
    if not any("keep" in options for options in recipe.mixers.values()):
        return tiny_teacher(name, num_hidden_layers=2 * len(recipe.pattern))
    config = AutoConfig.from_pretrained(shipped_folder() / "configs" / f"{name}.json")
    same = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {key: getattr(config, key) for key in same}
    return tiny_teacher(name, hidden_size=8 * config.num_attention_heads, **sizes)


def text(rows=2, time=16):
    ids, positions = torch.randint(1, 96, (rows, time + 1)), torch.arange(time).expand(rows, -1)
    return Batch(ids[:, :-1], positions * 0, positions, ids[:, 1:], torch.ones(rows, time), positions * 0)


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_every_stage(name):
    recipe, batch = load(name), text()
    teacher = teacher_of(recipe)
    student, transfers = build(teacher, layout_of(recipe.pattern, recipe.mixers, teacher.n_layers, name))
    for kind, options in recipe.stage_options():
        extra = (transfers,) if kind == "initialise" else ()
        stage = stage_class(kind)(teacher, student, options, *extra)
        stage.prepare()
        stage.begin(lambda tokens: [batch])
        if not stage.trains:
            continue
        trained = stage.trained()
        assert trained, f"{kind} trains nothing"
        for _, parameter in trained.values():
            parameter.requires_grad_(True)
        optimizer = make_optimizer(trained, options)
        for _ in range(2):
            before = [parameter.detach().clone() for _, parameter in trained.values()]
            for _, loss in stage.losses(batch):
                assert loss.isfinite()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert any(not torch.equal(old, new) for old, (_, new) in zip(before, trained.values(), strict=True))
        stage.finish(lambda tokens: [batch])
    assert student(batch.ids).logits.isfinite().all()
