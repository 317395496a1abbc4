"""The stage that prefers: pairs in windows, the losses by hand, references that are cached, resumed runs and two processes."""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import distill
from distill.build import build
from distill.errors import Interrupted
from distill.recipe_file import check
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.stages.prefer import Prefer
from students.config import Layout


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))


def pair(number):
    """A pair in one of the forms that are read."""
    asked = [{"role": "user", "content": f"what {number}?"}]
    good = [{"role": "assistant", "content": f"the sea {number} " * (1 + number % 3)}]
    bad = [{"role": "assistant", "content": f"stones {number}"}]
    forms = [
        {"prompt": asked, "chosen": good, "rejected": bad},
        {"chosen": asked + good, "rejected": asked + bad},
        {"prompt": f"what {number}?", "chosen": asked + good, "rejected": asked + bad},
        {"prompt": f"what {number}? ", "chosen": good[0]["content"], "rejected": bad[0]["content"]},
    ]
    return forms[number % 4]


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


def windows_of(session):
    return next(iter(session.stage_texts().values()))


def told(stage, windows):
    """A stage that knows what the teacher says of every window."""
    stage.prepare()
    whole = range(windows.count)
    known = stage.reference_log_probabilities(windows.at(whole))
    stage.refer_to(torch.cat([known, torch.zeros(len(windows.held))]), [])
    return stage


def log_ratio(session, student, batch, row):
    """Of one window by hand: the sum over its answer, and the answer's tokens."""
    total, count = 0.0, 0
    ours = (student.hidden(batch.ids, batch.documents) @ student.get_output_embeddings().weight.T).log_softmax(-1)
    model = session.teacher.model.get_output_embeddings().weight.T
    theirs = (session.teacher.hidden(batch.ids, batch.positions) @ model).log_softmax(-1)
    for place in range(batch.ids.shape[1]):
        if batch.trained[row, place]:
            token = batch.targets[row, place]
            total += (ours[row, place, token] - theirs[row, place, token]).item()
            count += 1
    return total, count


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


def test_a_run_resumes_to_the_same_bits(pair_recipe, tmp_path, monkeypatch, capsys):
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
    stops = 0
    while True:
        left = iter([None] * stops + ["enough"] + [None] * 1000)
        monkeypatch.setattr(Stopper, "due", lambda self, left=left: next(left))
        try:
            again = distill.run(pair_recipe, runs=tmp_path / "parts", console=Console(quiet=True))
            break
        except Interrupted:
            stops = 1
    one, two = (load_file(run.path / "student" / "model.safetensors") for run in (whole, again))
    assert stops and all(torch.equal(one[name], two[name]) for name in one)
    assert sum(made) <= 2 * 16  # windows that three steps read, and those that are held out
