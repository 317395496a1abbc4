"""What a command prepares at its start: a run prepares all of its text, an evaluation only the held-out text."""

import math

import pytest
import torch
from rich.console import Console

import distill
from distill import run
from distill.errors import UserError
from distill.evaluation import target
from distill.recipe_file import check
from distill.runs.run_dir import RunDir
from distill.runs.session import Session, make_accelerator
from distill.runs.stopper import Stopper
from distill.training.pipeline import Pipeline
from distill.training.runner import save_student


def unfinished(recipe, runs):
    """A run folder with a student that took no stage."""
    folder = RunDir.open(recipe, runs, fresh=False)
    save_student(Pipeline(Session.open(recipe), folder, Console(quiet=True), Stopper(math.inf)))
    return folder


def test_no_process_that_trains_or_judges_attends_through_cudnn(tiny_recipe):
    """Teachers and kept layers attend in transformers: see students/kernels/attention/reference.py."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    make_accelerator(check(tiny_recipe, "here"), None)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_an_evaluation_prepares_heldout_text_alone(tiny_recipe, tmp_path, monkeypatch):
    folder = unfinished(check(tiny_recipe, "here"), tmp_path)
    seen = []
    monkeypatch.setattr(target, "judge_session", lambda session, *rest, **options: seen.append(session) or {"not_run": []})
    monkeypatch.setattr("distill.reports.add_judgement", lambda *arguments: None)  # there is nothing to show
    distill.evaluate(folder.path)
    assert "windows" not in vars(seen[0]) and seen[0].heldout_windows.count
    assert seen[0].windows.count  # prepared when asked for


def test_a_mistake_in_the_training_text_shows_before_anything_is_written(tiny_recipe, tmp_path):
    tiny_recipe["data"]["train"] = [{"path": "nowhere/*.jsonl"}]
    recipe = check(tiny_recipe, "here")
    with pytest.raises(UserError, match=r"data\.train\.0: no file matches"):
        run(recipe, runs=tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("tiny-*"))
    opened = Session.open(recipe, trains=False)
    assert opened.heldout_windows.count
    with pytest.raises(UserError, match="no file matches"):
        _ = opened.windows
