"""Runs refuse another recipe, teacher or text, damaged checkpoints, two processes in one folder, and losses that are NaN."""

import json
import subprocess
import sys

import pytest

import distill
from distill.errors import Interrupted, UserError
from distill.runs import checkpoint
from distill.runs.stopper import Stopper
from distill.training import trainer
from tests.distill.tiny_runs import go, same, weights


@pytest.fixture
def stopped(tiny_recipe, tmp_path, monkeypatch):
    """A run stopped in the middle of align, and its entries."""
    steps = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(Stopper, "due", lambda self: "enough" if next(steps) == 6 else None)
        with pytest.raises(Interrupted):
            go(tiny_recipe, tmp_path)
    (folder,) = tmp_path.glob("tiny-*")
    assert checkpoint.latest(folder / "checkpoints").name.startswith("2-align")
    return tiny_recipe, tmp_path, folder


def test_an_edited_recipe(stopped):
    entries, runs, folder = stopped
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("seq_len: 32", "seq_len: 64"))
    with pytest.raises(UserError, match="is not the recipe this run was started with"):
        go(entries, runs)


def test_another_teacher_behind_the_same_name(stopped, tmp_path_factory):
    entries, runs, folder = stopped
    state = checkpoint.latest(folder / "checkpoints") / "state.json"
    content = json.loads(state.read_text())
    (folder / "run.json").write_text(json.dumps(folder_facts(folder) | {"teacher": "0" * 16}))
    with pytest.raises(UserError, match="the teacher is not the one this run was started with"):
        go(entries, runs)
    (folder / "run.json").unlink()
    state.write_text(json.dumps(content | {"teacher": "0" * 16}))
    with pytest.raises(UserError, match="was made with another teacher"):
        go(entries, runs)


def folder_facts(folder):
    return json.loads((folder / "run.json").read_text())


def test_another_text(stopped):
    entries, runs, folder = stopped
    (folder / "run.json").write_text(json.dumps(folder_facts(folder) | {"train_text": "x"}))
    with pytest.raises(UserError, match="the train text is not the one"):
        go(entries, runs)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(stopped, capsys):
    entries, runs, folder = stopped
    newest = checkpoint.latest(folder / "checkpoints")
    file = newest / "student.safetensors"
    data = bytearray(file.read_bytes())
    data[-10] ^= 0xFF
    file.write_bytes(data)
    found = weights(go(entries, runs).path)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "student.safetensors is damaged" in said and "going on after the end of stage orient" in said
    assert (newest.parent / f".damaged-{newest.name}" / "student.safetensors").read_bytes() == data
    assert same(found, weights(go(entries, runs / "whole").path))


def test_two_processes_in_one_folder_and_an_earlier_version(stopped, caplog):
    """A folder in use is refused. One that an earlier version wrote goes on, and a warning names what differs."""
    entries, runs, folder = stopped
    held = "with alone(sys.argv[1]): print(1, flush=True); time.sleep(60)"
    other = f"import sys, time; from distill.runs.run_dir import alone\n{held}"
    process = subprocess.Popen([sys.executable, "-c", other, str(folder)], stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        with pytest.raises(UserError, match=f"is in use by process {process.pid} on"):
            go(entries, runs)
    finally:
        process.kill()
        process.wait()
    facts = folder_facts(folder)
    (folder / "run.json").write_text(json.dumps(facts | {"versions": facts["versions"] | {"distill": "0.1.0"}}))
    assert (go(entries, runs).path / "student").exists()
    assert f"other versions: distill 0.1.0 then, {distill.__version__} now" in caplog.text
    assert folder_facts(folder)["versions"]["distill"] == "0.1.0"  # that it was started with


def test_weights_that_do_not_behave_as_saved(stopped):
    """The lineage check: a checkpoint whose weights were swapped for others of the same shapes is refused."""
    entries, runs, folder = stopped
    path = checkpoint.latest(folder / "checkpoints")
    tensors = {name: tensor + 0.05 for name, tensor in checkpoint.tensors_of(path, "student").items()}
    state = checkpoint.read_state(path)
    others = {name: checkpoint.tensors_of(path, name) for name in ("optimizer", "stage", "rng")}
    checkpoint.save(folder / "checkpoints", state, {"student": tensors, **others}, keep=2)
    with pytest.raises(UserError, match="could not be restored exactly: on the probe batch"):
        go(entries, runs)


def test_fresh_starts_again(stopped):
    entries, runs, folder = stopped
    (folder / "recipe.yaml").write_text("name: other\n" + (folder / "recipe.yaml").read_text().replace("name: tiny\n", ""))
    assert (go(entries, runs, fresh=True).path / "student").exists()


def test_a_loss_that_is_no_number(tiny_recipe, tmp_path, monkeypatch):
    def spoil(optimizer, factor):
        for group in optimizer.param_groups:
            group["lr"] = 1e30
        return 1e30

    monkeypatch.setattr(trainer, "set_rates", spoil)
    tiny_recipe["stages"] = [stage for stage in tiny_recipe["stages"] if {"initialise", "align"} & set(stage)]
    tiny_recipe["stages"][1]["align"] |= {"clip": None}
    with pytest.raises(
        UserError, match=r"stage align: the (loss of layer_\d+|gradient).*step \d.*The same recipe would fail again"
    ):
        go(tiny_recipe, tmp_path)


def test_layouts_and_vocabularies_that_do_not_fit(tiny_recipe, tmp_path):
    with pytest.raises(UserError, match=r"tiny: the layout's pattern 'AMMMM' names 5 layers, but the model has 4"):
        go(tiny_recipe | {"pattern": "AMMMM"}, tmp_path)
    with pytest.raises(UserError, match="has no option 'd_sate'"):
        go(tiny_recipe | {"mixers": {"M": {"mixer": "mamba2", "d_sate": 4}}}, tmp_path)
    with pytest.raises(UserError, match="twin: true needs mixers with a window branch"):
        go(tiny_recipe | {"twin": True, "mixers": {"M": {"mixer": "mamba2"}}}, tmp_path)
