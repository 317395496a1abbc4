"""Trackers: refused early where they are not installed; student and twin apart; steps counted over stages and resumes."""

import itertools
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from distill import run
from distill.errors import UserError
from distill.recipe_file import check
from distill.runs.run_dir import RunDir
from distill.runs.session import make_accelerator
from distill.training import trackers
from distill.training.trainer import Trainer

SHORT = {"evaluation": {"tokens": 64, "probe_tokens": 64, "passkey": []}}


def scalars(folder):
    """Steps by tag, of everything that TensorBoard would show of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_student_and_twin_are_apart_and_steps_go_on(tiny_recipe, tmp_path, monkeypatch):
    """Cut down in align two steps after a checkpoint: on going on, those steps replace what was there of them."""
    recipe = check(tiny_recipe | SHORT | {"trackers": ["tensorboard"], "twin": True, "checkpoints": {"steps": 3}}, "here")
    step, calls = Trainer.step, itertools.count()

    def dies(self, number):
        if next(calls) == 4 + 5:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", dies)
        run(recipe, runs=tmp_path)
    (path,) = tmp_path.glob("tiny-*")
    assert scalars(path / "trackers" / "tiny")["align/loss"] == [5, 6, 7, 8, 9]
    run(recipe, runs=tmp_path)
    found = scalars(path / "trackers" / "tiny")
    assert found["orient/loss"] == [1, 2, 3, 4]
    assert found["align/loss"] == [5, 6, 7, 8, 9, 10] and found["imitate/loss"] == [11, 12, 13, 14, 15, 16]
    twin = scalars(path / "twin" / "trackers" / "tiny")
    assert twin["align/loss"] == list(range(1, 11)) and twin["imitate/loss"] == list(range(11, 17))
    assert {"align/lr", "align/gradient_norm"} <= set(twin) and not any(tag.startswith("orient") for tag in twin)


def test_a_missing_package_is_named_before_anything_runs(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    for name, install in (("wandb", "'distill-hybrids[trackers]'"), ("comet_ml", "comet-ml")):
        with pytest.raises(UserError) as error:
            run(check(tiny_recipe | {"trackers": ["tensorboard", name]}, "here"), runs=tmp_path / "runs")
        assert f"trackers: {name} is not installed here; pip install {install}" in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_name(tiny_recipe):
    with pytest.raises(UserError, match="there is no tracker 'tensorbord'; did you mean 'tensorboard'"):
        check(tiny_recipe | {"trackers": ["tensorbord"]}, "here")


def test_judging_needs_no_tracker(tiny_recipe):
    recipe = check(tiny_recipe | {"trackers": ["wandb"]}, "here")
    assert make_accelerator(recipe, None).log_with == []


class Started(Accelerator):
    """An accelerator that keeps what its trackers were started with, and fails where told to."""

    def __init__(self, failure=None):
        self.trackers, self.failure, self.project_configuration = [], failure, SimpleNamespace(logging_dir=None)

    def init_trackers(self, project, init_kwargs):
        self.project, self.arguments = project, init_kwargs
        self.trackers = [Ended()]
        if self.failure:
            raise self.failure


class Ended(GeneralTracker):
    """A tracker that knows whether it was finished."""

    name, requires_logging_directory, tracker, over = "ended", False, None, False

    def __init__(self):
        pass

    def start(self):
        pass

    def store_init_configuration(self, values):
        pass

    def log(self, values, step, **unused):
        pass

    def finish(self):
        self.over = True


def test_services_get_one_run_a_student_and_resume_it(tiny_recipe, tmp_path):
    recipe, started = check(tiny_recipe | {"trackers": ["wandb", "trackio"]}, "here"), Started()
    folder, twin = RunDir(tmp_path / "tiny-1234"), RunDir(tmp_path / "tiny-1234" / "twin")
    trackers.start(started, recipe, folder, 0)
    assert started.project == "tiny" and started.arguments["wandb"]["name"] == "tiny-1234"
    assert started.arguments["wandb"]["resume"] is None and started.arguments["trackio"]["resume"] == "never"
    (first,) = started.trackers
    trackers.start(started, recipe, twin, 7)
    assert first.over, "the student's run should end before its twin's begins"
    assert started.arguments["wandb"] | {"config": None} == {
        "name": "tiny-1234-twin",
        "id": "tiny-1234-twin",
        "dir": str(twin.path / "trackers"),
        "resume": "allow",
        "config": None,
    }
    failing = Started(RuntimeError("no account"))
    with pytest.raises(UserError, match="trackers: wandb, trackio cannot start: no account"):
        trackers.start(failing, recipe, folder, 0)
    assert failing.trackers == []
