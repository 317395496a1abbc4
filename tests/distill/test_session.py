"""What a command prepares: a run everything at once, an evaluation the held-out text alone."""

import pytest

import distill
from distill import session
from distill.errors import UserError
from distill.recipe import check
from distill.runner import run
from distill.session import Session


@pytest.fixture
def parts(monkeypatch):
    """The parts of the text that are prepared."""
    prepared, usual = [], session.text_windows

    def recorded(recipe, tokenizer, part):
        prepared.append(part)
        return usual(recipe, tokenizer, part)

    monkeypatch.setattr(session, "text_windows", recorded)
    return prepared


def test_an_evaluation_prepares_heldout_text_alone(tiny_recipe, tmp_path, parts):
    tiny_recipe["stages"] = [{"initialise": {"tokens": 64}}]
    folder = run(check(tiny_recipe, "here"), runs=tmp_path)
    assert sorted(parts) == ["heldout", "train"]
    parts.clear()
    judged = distill.evaluate(folder.path)
    assert parts == ["heldout"] and judged["rows"]


def test_a_mistake_in_the_training_text_shows_before_anything_is_written(tiny_recipe, tmp_path):
    tiny_recipe["data"]["train"] = [{"path": "nowhere/*.jsonl"}]
    recipe = check(tiny_recipe, "here")
    with pytest.raises(UserError, match=r"data\.train\.0: no file matches"):
        run(recipe, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("tiny-*"))
    opened = Session.open(recipe, trains=False)
    assert opened.heldout_windows.count
    with pytest.raises(UserError, match="no file matches"):
        _ = opened.windows
