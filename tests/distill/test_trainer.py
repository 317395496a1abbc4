"""The training loop: two processes give one process's gradients; micro-batches change nothing; schedules and groups."""

import itertools

import pytest
import torch

from distill.stages.align import Align
from distill.stages.imitate import Imitate
from distill.training.optim import make_optimizer, rate_factor
from tests.distill.step_gradients import gradients


@pytest.mark.parametrize("stage", ["orient", "align", "imitate"])
def test_two_processes_and_micro_batches_give_one_process_gradients(tmp_path, tiny_recipe, stage):
    whole, losses = gradients(tmp_path, tiny_recipe, stage, processes=1)
    assert any(gradient.abs().max() > 1e-6 for gradient in whole.values())
    for processes, micro_batch in ((2, 2), (1, 1), (2, 1)):
        found, found_losses = gradients(tmp_path, tiny_recipe, stage, processes=processes, micro_batch=micro_batch)
        assert found.keys() == whole.keys()
        for name, gradient in whole.items():
            scale = gradient.abs().max().clamp_min(1.0)
            assert (found[name] - gradient).abs().max() <= 1e-6 * scale, (name, processes, micro_batch)
        assert found_losses == pytest.approx(losses, rel=1e-5)


def options(**changes):
    return Align.Options(**{"tokens": 1, "lr": 1e-3, **changes})


def test_schedules():
    wsd = [rate_factor(step, 100, options(warmup=0.1, decay=0.2)) for step in range(100)]
    assert wsd[0] == pytest.approx(1 / 11) and wsd[9] == pytest.approx(10 / 11)
    assert set(wsd[10:80]) == {1.0} and wsd[80] < 1 and wsd[99] == pytest.approx(1 / 21)
    assert all(a >= b for a, b in itertools.pairwise(wsd[10:]))
    cosine = [rate_factor(step, 100, options(schedule="cosine", warmup=0.0, final=0.1)) for step in range(100)]
    assert cosine[0] == 1.0 and cosine[50] == pytest.approx(0.55, abs=1e-3) and 0.1 < cosine[99] < 0.11
    assert {rate_factor(step, 10, options(schedule="constant", warmup=0.0)) for step in range(10)} == {1.0}
    assert rate_factor(0, 1, options()) > 0


def test_groups():
    matrix, vector = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    trained = {"a": ("ssm", matrix), "b": ("new", torch.nn.Parameter(torch.zeros(2, 2))), "c": ("ssm", vector)}
    optimizer = make_optimizer(trained, options(lr={"ssm": 1e-3, "new": 2e-3}))
    groups = {(group["lr"], group["weight_decay"]): len(group["params"]) for group in optimizer.param_groups}
    assert groups == {(2e-3, 0.0): 1, (1e-3, 0.0): 1, (1e-3, 0.1): 1}
    with pytest.raises(ValueError, match="this stage also trains 'new' parameters"):
        make_optimizer(trained, options(lr={"ssm": 1e-3}))


def test_imitate_names_roles(teacher):
    from distill.build import build
    from students.config import Layout

    student, _ = build(teacher, Layout("AMAM", {"M": {"mixer": "discrete_mamba2", "window": {"size": 4}}}))
    stage = Imitate(teacher, student, Imitate.Options(tokens=1, lr=1.0, train="all"))
    roles = {role for role, _ in stage.trained().values()}
    assert roles == {"new", "ssm", "window", "norms", "rest"}
    by_name = {name: role for name, (role, _) in stage.trained().items()}
    assert by_name["model.norm.weight"] == by_name["model.layers.0.input_layernorm.weight"] == "norms"
    assert by_name["model.embed_tokens.weight"] == "rest" and "lm_head.weight" not in by_name
