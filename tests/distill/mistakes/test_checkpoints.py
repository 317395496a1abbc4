"""Checkpoints that were edited, renamed, damaged, or made by another run."""

import json
import shutil

import pytest

import distill
from distill.errors import Interrupted
from distill.runs import checkpoint
from distill.runs.stopper import Stopper
from tests.distill.mistakes.damaged_runs import run_folder


def test_a_checkpoint_of_another_teacher(copied_place, refuse):
    folder = run_folder(copied_place, "half")
    newest = checkpoint.latest(folder / "checkpoints") / "state.json"
    newest.write_text(json.dumps(json.loads(newest.read_text()) | {"teacher": "0" * 16}))
    refuse(copied_place, ["run", "half.yaml"], ["was made with another teacher than", "fingerprints 0000", "--fresh"])


def step(state):
    return state | {"step": 2}


def window(state):
    return state | {"window": 0}


def probed(state):
    return state | {"probe": {name: value * 1.00001 for name, value in state["probe"].items()}}


def trained(state):
    return state | {"changed": ["model.norm.weight"]}


@pytest.mark.parametrize("edit", [step, window, probed, trained])
def test_a_checkpoint_whose_state_was_edited(copied_place, refuse, edit):
    newest = checkpoint.latest(run_folder(copied_place, "half") / "checkpoints") / "state.json"
    newest.write_text(json.dumps(edit(json.loads(newest.read_text()))))
    refuse(copied_place, ["run", "half.yaml"], ["state.json is not what was saved", "delete it to go on from", "--fresh"])


def test_a_checkpoint_that_was_renamed(copied_place, refuse):
    newest = checkpoint.latest(run_folder(copied_place, "half") / "checkpoints")
    newest.rename(newest.with_name("1-align-0000040"))
    refuse(copied_place, ["run", "half.yaml"], ["1-align-0000040/state.json is not what was saved", "its folder renamed"])


def test_a_checkpoint_of_another_recipe(copied_place, refuse):
    """Its tensors fit, and its teacher is the same: only the recipe that made it says whose it is."""
    ours = run_folder(copied_place, "half") / "checkpoints"
    theirs = checkpoint.latest(run_folder(copied_place, "short") / "checkpoints")
    shutil.copytree(theirs, ours / theirs.name)
    refuse(copied_place, ["run", "half.yaml"], ["was made by another recipe (fingerprint ", "copied here from another run"])


def test_a_checkpoint_of_an_earlier_version(copied_place, monkeypatch):
    """It names no recipe and has no digest, and its teacher's fingerprint knew only weights."""
    newest = checkpoint.latest(run_folder(copied_place, "half") / "checkpoints") / "state.json"
    state = json.loads(newest.read_text())
    del state["recipe"], state["digest"]
    newest.write_text(json.dumps(state | {"teacher": state["teacher"].partition("-")[0]}))
    monkeypatch.setattr(Stopper, "due", lambda self: "enough")
    with pytest.raises(Interrupted):
        distill.run("half.yaml", runs="runs")


def half_written(newest):
    shutil.copytree(newest, newest.with_name(f"{checkpoint.SCRATCH}1-align-0000009"))
    return []


def shard_gone(newest):
    (newest / "optimizer.safetensors").unlink()
    return ["is damaged", "optimizer.safetensors", f"set aside as .damaged-{newest.name}"]


def state_cut(newest):
    (newest / "state.json").write_text('{"stage": 1')
    return ["is damaged", f"set aside as .damaged-{newest.name}"]


def byte_flipped(newest):
    file = newest / "student.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    return ["student.safetensors is damaged", f"set aside as .damaged-{newest.name}"]


@pytest.mark.parametrize("damage", [half_written, shard_gone, state_cut, byte_flipped])
def test_damaged_checkpoints_fall_back_and_say_so(copied_place, capsys, monkeypatch, damage):
    """No mistake of the user's: the run goes on from the checkpoint before. (It is stopped again after a step.)"""
    newest = checkpoint.latest(run_folder(copied_place, "half") / "checkpoints")
    parts = damage(newest)
    capsys.readouterr()
    monkeypatch.setattr(Stopper, "due", lambda self: "enough")
    with pytest.raises(Interrupted):
        distill.run("half.yaml", runs="runs")
    said = " ".join(capsys.readouterr().err.split())
    before = (
        "going on after step 4 of stage align" if damage is half_written else "going on after the end of stage initialise"
    )
    for part in [*parts, before]:
        assert part in said, said
    assert not list(newest.parent.glob(f"{checkpoint.SCRATCH}*"))
    assert (newest.parent / f"{checkpoint.DAMAGED}{newest.name}").exists() == (damage is not half_written)
