"""The stage `prefer`: pairs in windows, losses by hand, cached references, resumed runs and two processes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

import distill
from distill.build import build
from distill.errors import Interrupted, UserError
from distill.planning import make_plan
from distill.recipe_file import check
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.stages.prefer import Prefer
from distill.training import references
from students.config import Layout
from tests.distill.preferring import SCRIPT, log_ratio, pair, told, windows_of
from tests.distill.test_tune import stopped_once
from tests.distill.two_processes import launcher

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def pair_recipe(chat_recipe, tmp_path):
    """Initialise and prefer: 24 pairs of every form."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair(number)) + "\n" for number in range(24)))
    options = {"tokens": 1152, "lr": 1e-3, "train": "mixers", "data": [{"path": str(tmp_path / "pairs.jsonl")}]}
    chat_recipe["stages"] = [chat_recipe["stages"][0], {"prefer": options}]
    return chat_recipe


@pytest.fixture
def opened(pair_recipe):
    recipe = check(pair_recipe, "here")
    session = Session.open(recipe)
    student, _ = build(session.teacher, Layout("AMAM", {"M": recipe.mixers["M"]}))
    return session, student


def test_windows_hold_pairs(opened):
    """Chosen, then rejected, behind the same prompt; answers alone are trained on; what is held out is in no epoch."""
    session, _ = opened
    windows, decode = windows_of(session), session.teacher.tokenizer.decode
    assert windows.count == 44 and len(windows.held) == 4
    seen = set()
    for batch in (windows.batch(first, 4) for first in range(0, 88, 4)):
        seen |= set(batch.windows.tolist())
        assert batch.ids.shape[1] % 24 == 0
        for row in range(0, 4, 2):
            said = [decode(batch.targets[at][batch.trained[at] > 0].tolist()) for at in (row, row + 1)]
            assert "the sea" in said[0] and "stones" in said[1] and all(one.endswith("<end>") for one in said)
            assert "what" not in "".join(said) and batch.windows[row] + 1 == batch.windows[row + 1]
            first = [int(batch.trained[at].argmax()) for at in (row, row + 1)]
            assert torch.equal(batch.ids[row, : min(first)], batch.ids[row + 1, : min(first)]) and "what" in decode(
                batch.ids[row, : min(first) + 1].tolist()
            )
    assert seen == set(range(44))
    held = torch.cat([batch.windows for batch in windows.held_batches(2)]).tolist()
    assert held == [44, 45, 46, 47]


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2, "beta": 0.7}, {"loss": "ipo", "beta": 0.3}], ids=["sigmoid", "smooth", "ipo"]
)
def test_losses_by_hand(opened, pair_recipe, options):
    session, student = opened
    windows = windows_of(session)
    options = Prefer.Options(**pair_recipe["stages"][1]["prefer"] | {"reference": "teacher"} | options)
    stage = told(Prefer(session.teacher, student, options), windows)
    batch, wanted = windows.batch(4, 4), []
    for row in (0, 2):
        (chosen, first), (rejected, second) = (log_ratio(session, student, batch, at) for at in (row, row + 1))
        margin = torch.tensor(options.beta * (chosen - rejected))
        if options.loss == "ipo":
            wanted.append((chosen / first - rejected / second - 1 / (2 * options.beta)) ** 2)
        else:
            e = options.label_smoothing
            wanted.append((-(1 - e) * margin.sigmoid().log() - e * (-margin).sigmoid().log()).item())
    ((_, loss),) = stage.losses(batch)
    assert loss.item() == pytest.approx(sum(wanted) / 2, rel=1e-4)
    found = stage.describe(loss.item())
    assert set(found) == {"reward_margin", "win_share"} and stage.describe(0.0) == {}
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


def test_a_run_resumes_to_the_same_bits(pair_recipe, tmp_path, monkeypatch):
    """Stopped after each step; the reference is worked out once; what is held out is in the report; it learns."""
    whole = distill.run(pair_recipe, runs=tmp_path / "whole", console=Console(quiet=True))
    found = json.loads((whole.path / "evaluations.json").read_text())["after"]["1-prefer"]["preferences"]
    assert found["pairs"] == 2 and 0 <= found["win_share"] <= 1
    lines = [json.loads(line) for line in (whole.path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] == "prefer"]
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and lines[0]["reward_margin"] == pytest.approx(0, abs=1e-3)
    assert lines[-1]["reward_margin"] > 0 and "win share" in (whole.path / "report.md").read_text()
    made = []
    original = Prefer.reference_log_probabilities
    monkeypatch.setattr(
        Prefer, "reference_log_probabilities", lambda self, batch: made.append(len(batch.ids)) or original(self, batch)
    )
    again, stops = stopped_once(pair_recipe, tmp_path / "parts", monkeypatch)
    one, two = (load_file(run.path / "student" / "model.safetensors") for run in (whole, again))
    assert stops and all(torch.equal(one[name], two[name]) for name in one)
    assert sum(made) <= 2 * 16  # windows that three steps read, and those that are held out


def test_two_processes_are_one(pair_recipe, tmp_path):
    """Each works out its share of the reference, here the teacher, and takes its pairs of a step."""
    pair_recipe["stages"][1]["prefer"] |= {"reference": "teacher", "micro_batch": 2, "clip": None}
    found = []
    for processes in (1, 2):
        place = tmp_path / str(processes)
        place.mkdir()
        (place / "r.yaml").write_text(yaml.safe_dump(pair_recipe))
        (place / "script.py").write_text(SCRIPT)
        done = subprocess.run(
            [sys.executable, *(launcher(processes) if processes > 1 else []), str(place / "script.py"), str(place)],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not done.returncode, done.stderr[-3000:]
        with safe_open(place / "found.safetensors", "pt") as file:
            loss = float(file.metadata()["loss"])
            found.append((loss, {name: file.get_tensor(name) for name in file.keys()}))  # noqa: SIM118
        parts = [json.loads(file.read_text()) for file in sorted((place / "references" / "1-prefer").glob("0*.json"))]
        found[-1] += ([value for part in parts for value in part["log_probabilities"]],)
    (one, first, known), (two, second, others) = found
    assert two == pytest.approx(one, rel=1e-5) and known == others and len(known) == 16
    for name, gradient in first.items():
        assert torch.allclose(second[name], gradient, atol=1e-5, rtol=1e-3), name


def test_references_are_checked(pair_recipe, tmp_path, monkeypatch):
    """Damaged ones of the teacher are made again; those of a student that has been trained since cannot be."""
    left = iter([None, "enough"])
    monkeypatch.setattr(Stopper, "due", lambda self: next(left, None))
    for reference in ("teacher", "student"):
        pair_recipe["stages"][1]["prefer"]["reference"] = reference
        left = iter([None, "enough"])
        with pytest.raises(Interrupted):
            distill.run(pair_recipe, runs=tmp_path / reference, console=Console(quiet=True))
        (file,) = (tmp_path / reference).glob("*/references/1-prefer/0*.json")
        whole = file.read_text()
        content = json.loads(whole)
        content["log_probabilities"][3] += 1e-3
        file.write_text(json.dumps(content))
        if reference == "teacher":
            distill.run(pair_recipe, runs=tmp_path / reference, console=Console(quiet=True))
            assert file.read_text() == whole
        else:
            with pytest.raises(UserError, match=r"000000.json is missing or damaged, and the student.*--fresh"):
                distill.run(pair_recipe, runs=tmp_path / reference, console=Console(quiet=True))


def test_options(pair_recipe, chat_recipe, tiny_teacher, tmp_path):
    """What has no effect, divides a pair or reads other text is refused; plans count both sequences and the reference."""

    def refused(**options):
        given = {**pair_recipe["stages"][1]["prefer"], **options}
        given = {name: value for name, value in given.items() if value is not None}
        with pytest.raises(UserError) as error:
            make_plan(check(pair_recipe | {"stages": [pair_recipe["stages"][0], {"prefer": given}]}, "here"))
        return str(error.value)

    assert "data is missing: this stage reads pairs (prompt, chosen, rejected)" in refused(data=None)
    assert "label_smoothing is 0.1, but loss: ipo has no smoothing" in refused(loss="ipo", label_smoothing=0.1)
    assert "teacher is given, but reference is 'student'" in refused(teacher="x/y")
    assert "batch is 3 windows, and a pair is two; give the stage an even batch" in refused(batch=3)
    assert "micro_batch is 1 windows, and a pair is two" in refused(micro_batch=1)
    assert "micro_batch is auto, and a pair is two windows" in refused(micro_batch="auto")
    data = pair_recipe["stages"][1]["prefer"]["data"]
    assert "pairs are always trained on their answers; leave it out" in refused(data=[data[0] | {"train_on": "all"}])
    with pytest.raises(UserError, match=r"prefer.batch is 4 windows, which 4 processes .* make it a multiple of 8"):
        make_plan(check(pair_recipe, "here"), gpus=4)
    flops = {}
    for reference in ("student", "teacher"):
        pair_recipe["stages"][1]["prefer"]["reference"] = reference
        plan = make_plan(check(pair_recipe, "here"))
        flops[reference] = plan.flops
        assert plan.tokens["prefer"] == 1152
    difference = 2 * 1152 * (plan.student_parameters - plan.teacher_parameters)
    assert flops["student"] - flops["teacher"] == pytest.approx(difference)


def test_text_of_another_form(pair_recipe, tmp_path):
    """Chats where pairs are read, and pairs where chats are."""
    pairs, chats = pair_recipe["stages"][1]["prefer"]["data"], pair_recipe["data"]["train"]
    pair_recipe["stages"][1]["prefer"]["data"] = chats
    with pytest.raises(UserError, match=r"stages.1.prefer.data.0: .*chats.jsonl, line 1: this is not a pair: it has"):
        distill.run(pair_recipe, runs=tmp_path / "runs")
    pair_recipe["data"]["train"] = pairs
    with pytest.raises(UserError, match=r"data.train.0: .*pairs.jsonl, line \d+: this is a pair"):
        distill.run(pair_recipe, runs=tmp_path / "runs")


def test_a_reference_of_another_vocabulary(pair_recipe, tiny_teacher, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_teacher, other)
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    one, two = list(vocabulary)[100:102]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(words))
    pair_recipe["stages"][1]["prefer"] |= {"reference": "teacher", "teacher": str(other)}
    with pytest.raises(UserError, match=r"stages.prefer.teacher is .*other, whose vocabulary is not that of .*; choose a"):
        distill.run(pair_recipe, runs=tmp_path / "runs")


def test_a_killed_reference_goes_on(pair_recipe, tmp_path, monkeypatch):
    """Behind the last whole part, wherever it was killed."""
    made, original = [], Prefer.reference_log_probabilities
    monkeypatch.setattr(references, "PART", 4)
    for killed in (3, 6, None):

        def counted(self, batch, killed=killed):
            if killed is not None and len(made) == killed:
                raise KeyboardInterrupt
            made.append(batch.windows.tolist())
            return original(self, batch)

        monkeypatch.setattr(Prefer, "reference_log_probabilities", counted)
        pair_recipe["stages"][1]["prefer"]["micro_batch"] = 2
        if killed is None:
            run = distill.run(pair_recipe, runs=tmp_path / "runs", console=Console(quiet=True))
        else:
            with pytest.raises((KeyboardInterrupt, Interrupted)):
                distill.run(pair_recipe, runs=tmp_path / "runs", console=Console(quiet=True))
    twice = [windows for number, windows in enumerate(made) if windows in made[:number]]
    assert len(made) - len(twice) == 8 and len(twice) == 2  # the first half of the part at work, each time
    files = sorted((run.path / "references" / "1-prefer").glob("0*.json"))
    assert [len(json.loads(file.read_text())["windows"]) for file in files] == [4, 4, 4, 4]
