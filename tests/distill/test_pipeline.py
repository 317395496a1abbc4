"""A recipe end to end on the tiny teacher: it finishes, improves, and resumes to the same bits."""

import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from distill import run
from distill.errors import Interrupted
from distill.recipe_file import check
from distill.runs.stopper import Stopper
from distill.stages import STAGES, stages_of
from distill.stages.stage import Stage, StageOptions
from distill.training import ending, pipeline
from distill.training.twin import twin_recipe
from students.config import Layout
from students.model import StudentMixin
from tests.conftest import tiny_entries
from tests.distill.tiny_runs import go, same, weights
from tests.distill.two_processes import in_two


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_teacher, text_files):
    """A whole run with twin and export, made once."""
    entries = tiny_entries(tiny_teacher, text_files) | {"twin": True, "export": ["portable"]}
    return go(entries, tmp_path_factory.mktemp("runs"))


def test_a_run_leaves_everything(finished):
    for name in (
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "transfer.json",
        "evaluations.json",
        "report.html",
        "report.md",
    ):
        assert (finished.path / name).stat().st_size > 0, name
    assert (finished.path / "export" / "portable" / "config.json").exists()
    assert (finished.path / "twin" / "student" / "model.safetensors").exists()
    stages = {line["stage"] for line in finished.metrics()}
    assert stages == {"orient", "align", "imitate"}
    assert {"tokens_per_second", "lr", "gradient_norm", "loss"} <= set(finished.metrics()[0])


def test_each_stage_lowers_its_own_heldout_loss(finished):
    after = list(finished.read("evaluations.json")["after"].items())
    for (_, before), (key, now) in itertools.pairwise(after):
        stage = key.partition("-")[2]
        assert now["probe"][stage] < before["probe"][stage], stage
    assert after[-1][1]["kl"] < after[0][1]["kl"]


def test_the_table_has_every_row(finished):
    rows = finished.read("evaluations.json")["final"]["rows"]
    assert list(rows) == ["teacher", "student", "no_state", "no_window", "twin", "window_layout", "window_everywhere"]
    assert abs(rows["teacher"]["fidelity"]["kl"]) < 1e-6 and rows["teacher"]["fidelity"]["agreement"] == 1.0
    for results in rows.values():
        measured = results["fidelity"]
        assert measured["by_position"] and measured["by_source"]
        parts = sum(band["kl"] * band["tokens"] for band in measured["by_source"])
        assert parts / measured["tokens"] == pytest.approx(measured["kl"], abs=1e-5)
        assert results["passkey"] == [{"length": 64, "recalled": results["passkey"][0]["recalled"], "trials": 2}]


def test_running_again_changes_nothing(finished):
    before = weights(finished.path)
    again = run(finished.recipe(), runs=finished.path.parent)
    assert same(before, weights(again.path))


@pytest.mark.parametrize("gone", ["export/portable/students_model.py", "twin/student/model.safetensors"])
def test_what_was_deleted_of_exports_and_twin_is_made_again(finished, tmp_path, gone):
    shutil.copytree(finished.path, folder := tmp_path / finished.path.name)
    before = (folder / gone).read_bytes()
    (folder / gone).unlink()
    again = run(finished.recipe(), runs=tmp_path)
    assert (folder / gone).read_bytes() == before and same(weights(finished.path), weights(again.path))
    assert again.read("evaluations.json") == finished.read("evaluations.json") and again.read("run.json")["finished"]


def test_the_twin_trains_the_windows_alone(tiny_recipe):
    from students.config import Layout

    recipe = check(tiny_recipe, "here")
    twin = twin_recipe(recipe, Layout.over(4, recipe.pattern, recipe.mixers))
    assert twin.mixers == {"M": {"mixer": "attention", "window": 4, "sinks": 2}}
    spent = [(entry.name, entry.options.tokens) for entry in stages_of(twin)]
    assert spent == [("initialise", 256), ("align", 768 + 512), ("imitate", 768)]


def test_stop_and_go_on_gives_the_same_bits(tiny_recipe, tmp_path, monkeypatch):
    whole = weights(go(tiny_recipe, tmp_path / "whole").path)
    from distill.runs.stopper import Stopper

    stops = 0
    while True:
        steps = iter(range(1000))
        monkeypatch.setattr(Stopper, "due", lambda self, steps=steps: "enough" if next(steps) == 2 else None)
        try:
            folder = go(tiny_recipe, tmp_path / "parts")
            break
        except Interrupted as reason:
            assert "enough in stage" in str(reason) and "the same command goes on" in str(reason)
            stops += 1
    assert stops >= 3
    assert same(whole, weights(folder.path))
    steps = [(line["stage"], line["step"]) for line in folder.metrics()]
    assert len(steps) == len(set(steps)) and steps == sorted(steps, key=lambda s: ("orient", "align", "imitate").index(s[0]))


def test_two_processes_take_a_whole_recipe(tiny_recipe, tmp_path):
    """Every barrier is met by both, checkpoints by the clock included, and the student is one process's."""
    alone = go(tiny_recipe, tmp_path / "alone")
    tiny_recipe["checkpoints"] = {"minutes": 0.001}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe))
    code, said = in_two("-m", "distill.cli", "run", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "two"))
    assert code == 0, said[-3000:]
    (folder,) = (tmp_path / "two").glob("tiny-*")
    found, expected = (
        json.loads((path / "evaluations.json").read_text())["final"]["rows"]["student"]["fidelity"]["kl"]
        for path in (folder, alone.path)
    )
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_go_on(tiny_recipe, tmp_path, number):
    tiny_recipe["stages"][2]["align"]["tokens"] = 200_000
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe))
    command = [sys.executable, "-m", "distill.cli", "run", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
    deadline = time.monotonic() + 120
    while not any('"align"' in file.read_text() for file in (tmp_path / "runs").glob("*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 3, said
    assert "in stage align" in said and "the same command goes on" in said and "Traceback" not in said
    (state,) = (tmp_path / "runs").glob("*/checkpoints/2-align-*/state.json")
    assert json.loads(state.read_text())["step"] > 0


# several stages


class Noted(Stage):
    """Closed form: it changes nothing, and says so in the weight-transfer record."""

    class Options(StageOptions):
        """None of its own."""

    trains, records = False, True

    def finish(self, calibration):
        for transfer in self.transfers.values():
            transfer.set("(note)", "seen again")


def test_a_resumed_run_keeps_what_earlier_stages_recorded(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(STAGES, "note", f"{__name__}:Noted")
    tiny_recipe["stages"] = [tiny_recipe["stages"][0], tiny_recipe["stages"][2], {"note": {"tokens": 64}}]
    whole = go(tiny_recipe, tmp_path / "whole").read("transfer.json")
    assert {"(note)", "(output scales)"} <= {name.rpartition(".")[2] for name in whole["sources"]}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Stopper, "due", lambda self: "enough")
        go(tiny_recipe, tmp_path / "parts")
    assert go(tiny_recipe, tmp_path / "parts").read("transfer.json") == whole


def live(kind):
    """How many objects of a class there are."""
    gc.collect()
    return sum(issubclass(type(found), kind) for found in gc.get_objects())


def test_nothing_of_a_stage_outlives_it(tiny_recipe, tmp_path, monkeypatch):
    """No optimizer is left when a stage ends or the next one is made, and one student alone when all are judged."""
    seen = {}

    def watch(place, function, kind):
        original, counts = getattr(place, function), seen.setdefault(function, [])
        before = live(kind)
        monkeypatch.setattr(place, function, lambda *a, **k: (counts.append(live(kind) - before), original(*a, **k))[1])

    watch(pipeline, "fidelity", torch.optim.AdamW)
    watch(pipeline.Pipeline, "_begin", torch.optim.AdamW)
    watch(ending, "judge_session", StudentMixin)
    go(tiny_recipe | {"twin": True}, tmp_path)
    assert set(seen["fidelity"]) == set(seen["_begin"]) == {0} and len(seen["_begin"]) == 4 + 3
    assert seen["judge_session"] == [1]


def test_a_twin_of_two_stages_of_one_name(tiny_recipe):
    """Each keeps its own options; what orient reads goes to the first that trains."""
    tiny_recipe["stages"].append({"align": {"tokens": 256, "lr": 5e-4}})
    recipe = check(tiny_recipe, "here")
    twin = twin_recipe(recipe, Layout.over(4, recipe.pattern, recipe.mixers))
    assert [(entry.name, entry.options.tokens) for entry in stages_of(twin)] == [
        ("initialise", 256),
        ("align", 768 + 512),
        ("imitate", 768),
        ("align", 256),
    ]
    assert stages_of(twin)[3].options.lr == 5e-4
