"""`micro_batch: auto`: finds the most windows at a time that fit, changes nothing else, and is remembered with the run."""

import pytest
import torch

import distill
from distill.errors import UserError
from distill.footprint import most_windows
from distill.recipe_file import check
from distill.runs import random_states
from distill.training import fitting
from tests.conftest import tiny_entries


@pytest.mark.parametrize("share", [1, 2, 7, 12, 16, 60, 64])
def test_the_largest_divisor_that_fits(share):
    for limit in range(share + 2):
        asked = []

        def fits(count, limit=limit, asked=asked):
            asked.append(count)
            return count <= limit

        wanted = max((count for count in range(1, share + 1) if share % count == 0 and count <= limit), default=0)
        assert most_windows(share, fits) == wanted
        assert len(asked) == len(set(asked)) <= 12 and all(share % count == 0 for count in asked)


@pytest.fixture
def entries(tiny_teacher, text_files):
    recipe = tiny_entries(tiny_teacher, text_files)
    recipe["stages"] = [{"initialise": {"tokens": 64}}, {"align": {"tokens": 768, "lr": 1e-3}}]
    recipe["data"]["micro_batch"] = "auto"
    return recipe


def sizes_of(folder):
    return {key: entry["windows"] for key, entry in folder.read("run.json")["micro_batches"].items()}


def test_a_run_finds_it_says_it_and_keeps_it(entries, tmp_path, monkeypatch, capsys):
    """Half a step's windows fit: gradients add up to the same student; a resumed run and one of another device."""
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "_beside", lambda one, two, count, processes: count)
        patch.setattr(fitting, "available", lambda device: 2 / (1 - fitting.RESERVE))
        folder = distill.run(entries, runs=tmp_path)
    assert sizes_of(folder) == {"1-align": 2}
    assert "micro_batch of align: 2 windows at a time" in " ".join(capsys.readouterr().err.split())
    whole = distill.run({**entries, "data": {**entries["data"], "micro_batch": 4}}, runs=tmp_path)
    for found, wanted in zip(folder.metrics(), whole.metrics(), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=2e-4)

    known = folder.read("run.json")["micro_batches"]["1-align"]
    assert known["processes"] == 1 and known["device"].startswith("cpu, ")
    trainer, entry, recipe = trainer_of(entries, monkeypatch)
    layout = trainer.stage.student.layout
    monkeypatch.setattr(fitting, "_estimated", lambda *unused: 1)
    assert "as found before" in fitting.fit_micro_batch(trainer, entry, recipe, folder, layout) and trainer.micro_batch == 2
    monkeypatch.setattr(fitting, "device_name", lambda device: "another")
    fitting.fit_micro_batch(trainer, entry, recipe, folder, layout)
    assert trainer.micro_batch == 1 and sizes_of(folder)["1-align"] == 1


def trainer_of(entries, monkeypatch):
    """The trainer of align, with its entry and recipe."""
    from distill.build import build, layout_of
    from distill.runs.session import Session
    from distill.stages import stages_of
    from distill.training.trainer import Trainer

    recipe = check(entries, "tiny.yaml")
    session = Session.open(recipe)
    layout = layout_of(recipe.pattern, recipe.mixers, 4, "tiny.yaml")
    student, transfers = build(session.teacher, layout)
    entry = stages_of(recipe)[1]
    stage = entry.make(session.teacher, student, transfers)
    return Trainer(stage, session.accelerator, session.windows, 0, 4, 4), entry, recipe


def test_dry_steps_leave_no_trace(entries, monkeypatch):
    trainer, _, _ = trainer_of(entries, monkeypatch)
    weights = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    before, tried = random_states.random_tensors(), []
    losses = trainer.stage.losses

    def limited(batch):
        tried.append(len(batch.ids))
        torch.rand(3)
        for name, loss in losses(batch):
            if len(batch.ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            yield name, loss

    monkeypatch.setattr(trainer.stage, "losses", limited)
    assert most_windows(4, fitting.fits_dry(trainer)) == 2
    assert tried == [1, 1, 2, 2, 4]
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in trainer.parameters.items())
    assert not trainer.optimizer.state
    after = random_states.random_tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    monkeypatch.setattr(
        trainer.stage, "losses", lambda batch: (_ for _ in ()).throw(RuntimeError("a fault of another kind"))
    )
    with pytest.raises(RuntimeError, match="another kind"):
        fitting.fits_dry(trainer)(1)


def test_the_footprint_bounds_it_on_a_cpu(entries, monkeypatch):
    from distill.build import layout_of

    trainer, entry, recipe = trainer_of(entries, monkeypatch)
    layout = layout_of(recipe.pattern, recipe.mixers, 4, "tiny.yaml")
    fitting.fit_micro_batch(trainer, entry, recipe, None, layout)
    assert trainer.micro_batch == 4  # all of a step
    monkeypatch.setattr(fitting, "available", lambda device: 1000)
    with pytest.raises(UserError, match=r"tiny: micro_batch of align is auto, and not even one window of 32 tokens"):
        fitting.fit_micro_batch(trainer, entry, recipe, None, layout)


def test_plans_of_auto(entries):
    assert distill.plan(entries, gpus=1).needs["align"].windows == 4
    assert distill.plan(entries, gpus=1, gpu_memory=1e-3).needs["align"].windows < 4


@pytest.mark.parametrize(("key", "value"), [("data.micro_batch", "many"), ("stages.align.micro_batch", "many")])
def test_other_words_are_refused(entries, key, value):
    with pytest.raises(UserError, match=rf"{key.split('.')[-1]} is '{value}': .*or it should be 'auto'"):
        distill.plan(entries, overrides=f"{key}={value}")
