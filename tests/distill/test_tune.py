"""The stage `tune`: cross-entropy and KL by hand, its options, micro-batches, resumed runs and two processes."""

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import distill
from distill.build import build
from distill.errors import Interrupted, UserError
from distill.planning import make_plan
from distill.recipe_file import check
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.stages import stages_of
from distill.stages.tune import Tune
from distill.text.windows import Batch
from distill.training.trainer import Trainer
from students.config import Layout
from tests.distill.step_gradients import gradients
from tests.distill.test_chat_training import log_probabilities

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def opened(chat_recipe):
    recipe = check(chat_recipe, "here")
    session = Session.open(recipe)
    return session, lambda: build(session.teacher, Layout("AMAM", {"M": recipe.mixers["M"]}))[0]


def stage_of(session, student, **options):
    stage = Tune(session.teacher, student, Tune.Options(**{"tokens": 1, "lr": 1e-3, "clip": None, **options}))
    stage.prepare()
    return stage


@pytest.mark.parametrize("kl", [0.0, 0.3, 2.0])
def test_the_loss_by_hand(opened, kl):
    """On completions alone; on every token of plain text; 0 where there are none."""
    session, student = opened[0], opened[1]()
    stage, batch = stage_of(session, student, kl=kl), session.windows.batch(0, 2)
    ours, theirs = log_probabilities(student, batch), log_probabilities(None, batch, session.teacher)
    tokens = -ours.gather(-1, batch.targets[..., None])[..., 0] + kl * (theirs.exp() * (theirs - ours)).sum(-1)
    for one, weights in ((batch, batch.trained), (Batch(**{**vars(batch), "trained": None}), batch.weights)):
        ((_, loss),) = stage.losses(one)
        assert loss.item() == pytest.approx(tokens[weights > 0].mean().item(), rel=1e-4)
    loss.backward()
    wanted = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    found = torch.autograd.grad(tokens[batch.weights > 0].mean(), [dict(student.named_parameters())[n] for n in wanted])
    for (name, gradient), by_hand in zip(wanted.items(), found, strict=True):
        assert torch.allclose(gradient, by_hand, atol=1e-5, rtol=1e-3), name
    ((_, loss),) = stage.losses(Batch(**{**vars(batch), "trained": torch.zeros_like(batch.trained)}))
    assert loss.item() == 0.0 and (stage.running is None) == (kl == 0)


def test_micro_batches_and_adapters(opened):
    """Whatever the windows at a time; adapters alone have gradients; layers computed again give the same."""
    session, found = opened[0], {}
    for size, options in ((4, {}), (1, {}), (3, {"activation_checkpointing": True})):
        stage = stage_of(session, opened[1](), train="lora", lora={"rank": 2}, **options)
        trainer = Trainer(stage, session.accelerator, session.windows, 0, 4, size)
        trainer.optimizer.step = trainer.optimizer.zero_grad = lambda **keywords: None
        found[size] = trainer.step(0).loss, {name: p.grad for name, p in trainer.parameters.items() if p.grad is not None}
    assert any(".lora_" in name for name in found[4][1])
    assert all(".lora_" in name or ".mixer." in name for name in found[4][1])
    for size in (1, 3):
        assert found[size][0] == pytest.approx(found[4][0], rel=1e-5)
        for name, wanted in found[4][1].items():
            assert torch.allclose(found[size][1][name], wanted, atol=1e-6, rtol=1e-4), (size, name)


def test_options(chat_recipe):
    """What has no effect is refused; the teacher is counted where it runs alone."""
    stages, flops = chat_recipe["stages"][:1], {}
    for options, said in (
        ({"teacher": "x/y"}, "teacher is given, but its weight, kl, is 0"),
        ({"offline_logits": "x"}, "offline_logits is given, but its weight, kl"),
        ({"offline_logits": "x", "kl": 1.0, "divergence": "jsd"}, "offline_logits bound the forward KL"),
        ({"kl": -1.0}, "kl"),
        ({"lora": {"rank": 2}}, "lora is given, but train is 'all'"),
    ):
        with pytest.raises(UserError, match=said):
            check(chat_recipe | {"stages": [*stages, {"tune": {"tokens": 96, "lr": 1e-3, **options}}]}, "here")
    for kl in (0.0, 0.1):
        recipe = check(chat_recipe | {"stages": [*stages, {"tune": {"tokens": 9600, "lr": 1e-3, "kl": kl}}]}, "here")
        plan = make_plan(recipe)
        flops[kl] = plan.flops
        assert stages_of(recipe)[1].runs_teacher == (kl > 0)
    assert flops[0.1] - flops[0.0] == pytest.approx(2 * 9600 * plan.teacher_parameters)


def stopped_once(recipe, runs, monkeypatch):
    """A run that was stopped at the first chance and gone on with, and how often that was."""
    stops = 0
    while True:
        left = iter([None] * stops + ["enough"] + [None] * 1000)
        monkeypatch.setattr(Stopper, "due", lambda self, left=left: next(left))
        try:
            return distill.run(recipe, runs=runs, console=Console(quiet=True)), stops
        except Interrupted:
            stops = 1


def test_a_run_resumes_to_the_same_bits(chat_recipe, tmp_path, monkeypatch):
    chat_recipe["stages"] = [chat_recipe["stages"][0], {"tune": {"tokens": 1152, "lr": 1e-3, "train": "mixers", "kl": 0.1}}]
    whole = distill.run(chat_recipe, runs=tmp_path / "whole", console=Console(quiet=True))
    again, stops = stopped_once(chat_recipe, tmp_path / "parts", monkeypatch)
    one, two = (load_file(run.path / "student" / "model.safetensors") for run in (whole, again))
    assert stops and all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_are_one(chat_recipe, tmp_path, opened):
    """Whose windows hold other numbers of completions."""
    gradients_of, losses = gradients(tmp_path, chat_recipe, "tune", processes=2)
    session, student = opened[0], opened[1]()
    trainer = Trainer(stage_of(session, student), session.accelerator, session.windows, 0, 4, 4)
    trainer.optimizer.step = trainer.optimizer.zero_grad = lambda **keywords: None
    assert trainer.step(0).losses == pytest.approx(losses, rel=1e-5)
    for name, parameter in trainer.parameters.items():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, gradients_of[name], atol=1e-5, rtol=1e-3), name
