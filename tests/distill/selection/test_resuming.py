"""Selections and runs that were interrupted measure only what is missing, and end in the same choice."""

import json

import pytest
import torch
import yaml

from distill import run, select
from distill.errors import Interrupted, UserError
from distill.recipe_file import check
from distill.runs.stopper import Stopper
from distill.selection.checking import selection_options
from distill.selection.gates import GateState, _reads_recall
from distill.selection.measures import Material
from tests.distill.selection.planted import LAYER, chosen_by, written


class StopsAfter(Stopper):
    """Asks to stop when so many measurements were allowed."""

    def __init__(self, count):
        super().__init__()
        self.left = count

    def due(self):
        self.left -= 1
        return "enough" if self.left < 0 else None


def count_measurements(monkeypatch):
    made, measure = [], Material.measure

    def counted(self, model, name):
        made.append(name)
        return measure(self, model, name)

    monkeypatch.setattr(Material, "measure", counted)
    return made


def test_an_interrupted_selection_measures_only_what_is_missing(entries, tmp_path, monkeypatch):
    made = count_measurements(monkeypatch)
    whole = chosen_by(entries, tmp_path / "whole" if (tmp_path / "whole").mkdir() is None else tmp_path)
    every = len(made)
    (tmp_path / "cut").mkdir()
    path = written(tmp_path / "cut", entries)
    made.clear()
    monkeypatch.setattr("distill.selection.request.Stopper", lambda: StopsAfter(5))
    with pytest.raises(Interrupted, match=r"enough while selecting; the same command goes on from .*selection\.json"):
        select(path, runs=tmp_path / "cut" / "runs")
    assert len(made) == 5
    monkeypatch.setattr("distill.selection.request.Stopper", Stopper)
    again = select(path, runs=tmp_path / "cut" / "runs")
    assert len(made) == every
    for chosen in (whole, again):  # what may differ
        del chosen["cost"]["seconds"], chosen["cost"]["predicted_seconds"], chosen["folder"]
        for numbers in chosen["models"].values():
            del numbers["seconds"]
    assert again == whole
    select(path, runs=tmp_path / "cut" / "runs")
    assert len(made) == every  # all of it is known


def test_a_kill_between_layers_leaves_whole_records(entries, tmp_path, monkeypatch):
    made = count_measurements(monkeypatch)
    measure = Material.measure

    def killed(self, model, name):
        if len(made) == 4:
            raise SystemExit
        return measure(self, model, name)

    monkeypatch.setattr(Material, "measure", killed)
    path = written(tmp_path, entries)
    with pytest.raises(SystemExit):
        select(path, runs=tmp_path / "runs")
    (file,) = (tmp_path / "runs").glob("*/selection.json")
    measured = json.loads(file.read_text())["measured"]
    assert sum(len(measures) for measures in measured.values()) == 4 and "layer 1" in measured
    monkeypatch.setattr(Material, "measure", measure)
    assert select(path, runs=tmp_path / "runs")["layers"] == [0, LAYER]
    text = json.loads(file.read_text())
    text["facts"]["teacher"] = "another"
    file.write_text(json.dumps(text))
    with pytest.raises(UserError, match="the teacher is not the one that was measured there"):
        select(path, runs=tmp_path / "runs")


def test_gates_resume_to_the_same_bits(entries, tmp_path, monkeypatch):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    options = {"by": "gates", "training_tokens": 1200, "save": 1}
    whole = chosen_by(entries, tmp_path / "whole", **options)
    monkeypatch.setattr("distill.selection.request.Stopper", lambda: StopsAfter(4))
    path = written(tmp_path / "cut", entries)
    with pytest.raises(Interrupted):
        select(path, runs=tmp_path / "cut" / "runs")
    monkeypatch.setattr("distill.selection.request.Stopper", Stopper)
    assert select(path, runs=tmp_path / "cut" / "runs")["ranking"] == whole["ranking"]


def test_gates_share_their_steps_and_survive_json(entries):
    entries["pattern"] |= {"by": "gates", "retrieval": 0.25}
    options = selection_options(check(entries, "here"))
    assert [_reads_recall(step, options) for step in range(8)] == [False, False, False, True] * 2
    state = GateState.new(3)
    state.take(torch.tensor([0.1, -0.2, 1 / 3]), lr=0.07)
    again = GateState.read(json.loads(json.dumps(state.entries())))
    for one, other in ((state, again), (GateState.read(state.entries()), again)):
        one.take(torch.tensor([0.3, 0.1, -1 / 7]), lr=0.07)
        other_after = GateState.read(other.entries())
        other_after.take(torch.tensor([0.3, 0.1, -1 / 7]), lr=0.07)
        assert torch.equal(one.logits, other_after.logits)


def test_a_run_selects_trains_and_resumes(tiny, tmp_path, monkeypatch):
    tiny["twin"] = True
    recipe = check(tiny, "mine.yaml")
    made = count_measurements(monkeypatch)
    folder = run(recipe, runs=tmp_path)
    assert folder.path.name == f"tiny-{recipe.fingerprint}"
    assert folder.recipe() == recipe  # as given
    pattern = folder.read("selection.json")["chosen"]["pattern"]
    assert sorted(pattern) == ["A", "M", "M", "M"]
    resolved = yaml.safe_load((folder.path / "resolved.yaml").read_text())
    assert check(resolved, "resolved").pattern == pattern
    for student in (folder.student, folder.path / "twin" / "student"):
        assert json.loads((student / "config.json").read_text())["distill"]["layout"]["pattern"] == pattern
    count = len(made)
    (folder.path / "run.json").write_text(json.dumps(folder.read("run.json") | {"finished": False}))
    run(recipe, runs=tmp_path)
    assert len(made) == count
    text = (folder.path / "resolved.yaml").read_text()
    (folder.path / "resolved.yaml").write_text(text.replace(pattern, pattern[::-1]))
    (folder.path / "run.json").write_text(json.dumps(folder.read("run.json") | {"finished": False}))
    with pytest.raises(UserError, match=r"resolved\.yaml is not the layout that was selected here"):
        run(recipe, runs=tmp_path)
