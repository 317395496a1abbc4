"""Every shipped recipe's layout and stages, two steps each, on a tiny random teacher of its family and depth."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.build import build, layout_of
from distill.optim import make_optimizer
from distill.plan import teacher_config
from distill.recipe import load, shipped_folder
from distill.stages import stage_class
from teachers.families import family_of
from teachers.teacher import Teacher
from tests.distill.test_families import text
from tests.teachers.tiny import SMALL, SMALLER

SHIPPED = sorted(path.stem for path in shipped_folder().glob("*.yaml"))


def tiny(recipe):
    """A random teacher with the config of the recipe's, as deep, and narrow."""
    config = teacher_config(recipe)
    small = {**SMALL, **SMALLER.get(config.model_type, {}), "num_hidden_layers": config.num_hidden_layers}
    config = type(config)(**{**config.to_dict(), **small})
    family = family_of(config, recipe.teacher)
    attention = {} if family.attention is None else {"attn_implementation": family.attention}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention).eval()
    return Teacher(recipe.teacher, model, None, family)


@pytest.mark.parametrize("name", SHIPPED)
def test_two_steps_of_each_stage(name):
    recipe, batch = load(name), text()
    teacher = tiny(recipe)
    student, transfers = build(teacher, layout_of(recipe.pattern, recipe.mixers, teacher.n_layers, name, recipe.meta_tokens))
    for stage_name, options in recipe.stage_options():
        extra = (transfers,) if stage_name == "initialise" else ()
        stage = stage_class(stage_name)(teacher, student, options, *extra)
        stage.prepare()
        stage.begin(lambda tokens: iter([batch]))
        if stage.trains:
            parameters = stage.trained()
            for _, parameter in parameters.values():
                parameter.requires_grad_(True)
            optimizer = make_optimizer(parameters, options)
            for _ in range(2):
                for _, loss in stage.losses(batch):
                    assert loss.isfinite()
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        stage.finish(lambda tokens: iter([batch]))
    ids = torch.randint(1, SMALL["vocab_size"], (1, 6))
    made = student.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 8)
