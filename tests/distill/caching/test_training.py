"""Training from cached logits."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import distill
from distill.build import build
from distill.errors import Interrupted, UserError
from distill.logits.reader import LogitCache
from distill.recipe_file import load
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.stages import stages_of
from distill.stages.targets import Cached
from distill.training.trainer import Trainer
from students.config import Layout
from teachers.teacher import Teacher
from tests.distill.caching.caches import QUIET, offline


def test_no_teacher_runs_in_its_steps(recipe, cached, monkeypatch):
    running, calls = [], []
    step, hidden = Trainer.step, Teacher.hidden

    def stepping(self, number):
        running.append(1)
        try:
            return step(self, number)
        finally:
            running.pop()

    def asked(self, *arguments):
        calls.append(bool(running))
        return hidden(self, *arguments)

    monkeypatch.setattr(Trainer, "step", stepping)
    monkeypatch.setattr(Teacher, "hidden", asked)
    folder = offline(recipe)
    assert calls and not any(calls)
    steps = [line for line in folder.metrics() if line["stage"] == "imitate"]
    assert len(steps) == 6 and all(line["kl_lower_bound"] == line["loss"] for line in steps)


def test_all_but_one_token_is_the_whole(recipe):
    """With one token as the rest the loss is the KL, but for what float16 rounds, ce and temperature included."""
    over = ["stages.imitate.ce=0.2", "stages.imitate.temperature=1.5"]
    folder = distill.cache(recipe, overrides=over, out="logits", top_k=319, console=QUIET)
    session = Session.open(load(recipe, over))
    student, _ = build(session.teacher, Layout.over(4, "AM", recipe["mixers"]))
    (entry,) = [one for one in stages_of(session.recipe) if one.name == "imitate"]
    stage, batch = entry.make(session.teacher, student), session.windows.batch(8, 24)
    stage.prepare()
    (_, whole), gradients = next(iter(stage.losses(batch))), []
    stage.learn_from(Cached(LogitCache(folder, "x")))
    (_, found) = next(iter(stage.losses(batch)))
    for loss in (whole, found):
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p for _, p in stage.trained().values()])])
        )
    assert found.item() == pytest.approx(whole.item(), rel=1e-3) and found.item() != whole.item()
    assert (gradients[1] - gradients[0]).norm() < 1e-2 * gradients[0].norm()


def test_goes_on_with_the_same_cache_alone(recipe, cached, monkeypatch):
    """Stopped after two steps: refused with a cache of another form, the same bits with its own."""
    whole = offline(recipe, runs="whole")
    asked = iter(range(1000))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Stopper, "due", lambda self: "enough" if next(asked) == 1 else None)
        offline(recipe)
    cached.rename("kept")
    distill.cache(recipe, out="logits", top_k=9, console=QUIET)
    with pytest.raises(UserError, match="the cache of logits of stage imitate is not the one that it began with"):
        offline(recipe)
    shutil.rmtree("logits")
    Path("kept").rename("logits")
    done = offline(recipe)
    found, wanted = (load_file(folder.student / "model.safetensors") for folder in (done, whole))
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_recipe_without_these_keys_keeps_its_run(recipe):
    """And one that has them has a run of its own."""
    before = load(recipe).fingerprint
    assert load(recipe, "stages.imitate.offline_logits=logits").fingerprint != before
    assert load(recipe, "stages.imitate.teacher=x").fingerprint != before
