"""Training and evaluation on completions: the mean of a loss, and resuming to the same bits, with one process and two."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import distill
from distill.build import build
from distill.errors import Interrupted, UserError
from distill.evaluation import records
from distill.evaluation.fidelity import Fidelity, fidelity
from distill.logits.reader import LogitCache
from distill.recipe_file import check
from distill.reports.tables import headline_cells
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.stages.align import Align
from distill.stages.imitate import Imitate
from distill.stages.targets import Cached
from distill.text.windows import Batch
from distill.training.trainer import Trainer
from students.config import Layout
from tests.distill.step_gradients import gradients

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def opened(chat_recipe):
    """A session on chats, and an untrained student."""
    recipe = check(chat_recipe, "here")
    session = Session.open(recipe)
    student, _ = build(session.teacher, Layout("AMAM", {"M": recipe.mixers["M"]}))
    return session, student


def log_probabilities(model, batch, teacher=None):
    hidden = model.hidden(batch.ids, batch.documents) if teacher is None else teacher.hidden(batch.ids, batch.positions)
    return (hidden @ (model if teacher is None else teacher.model).get_output_embeddings().weight.T).log_softmax(-1)


@pytest.mark.parametrize("ce", [0.0, 0.3])
def test_the_loss_is_a_mean_over_completions(opened, ce):
    """Of KL and cross-entropy, by hand; of a window without any it is 0, and so are its gradients."""
    session, student = opened
    stage = Imitate(session.teacher, student, Imitate.Options(tokens=1, lr=1e-3, ce=ce))
    stage.prepare()
    batch = session.windows.batch(0, 3)
    ((_, loss),) = stage.losses(batch)
    ours, theirs = log_probabilities(student, batch), log_probabilities(None, batch, session.teacher)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    entropy = -ours.gather(-1, batch.targets[..., None])[..., 0]
    tokens = (1 - ce) * kl + ce * entropy
    assert 0 < batch.trained.sum() < batch.weights.sum()
    assert loss.item() == pytest.approx(tokens[batch.trained > 0].mean().item(), rel=1e-4)
    assert loss.item() != pytest.approx(tokens[batch.weights > 0].mean().item(), rel=1e-3)
    assert stage.size(batch) == batch.trained.sum()
    nothing = Batch(**{**vars(batch), "trained": torch.zeros_like(batch.trained)})
    hidden = Imitate(session.teacher, student, Imitate.Options(tokens=1, lr=1e-3, ce=ce, hidden=1.0))
    for one in (stage, hidden):
        ((_, loss),) = one.losses(nothing)
        loss.backward()
        assert loss.item() == 0.0 == one.size(nothing)
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_micro_batches_weigh_by_completions(opened):
    """Windows of unequal numbers of completions, one of them without any, at a time or together."""
    session, student = opened
    found = {}
    marks = session.windows.batch(0, 4).trained.clone()
    marks[1] = 0
    marks[2, : marks.shape[1] // 2] = 0

    class Fewer:
        seq_len = session.windows.seq_len

        def batch(self, first, count):
            batch = session.windows.batch(first, count)
            return Batch(**{**vars(batch), "trained": marks[first : first + count]})

    for size in (4, 1, 3):
        student, _ = build(session.teacher, Layout("AMAM", {"M": session.recipe.mixers["M"]}))
        stage = Imitate(session.teacher, student, Imitate.Options(tokens=1, lr=1e-3, clip=None, train="mixers"))
        stage.prepare()
        trainer = Trainer(stage, session.accelerator, Fewer(), 0, 4, size)
        trainer.optimizer.step = trainer.optimizer.zero_grad = lambda **keywords: None
        losses = trainer.step(0).losses
        found[size] = losses["loss"], {name: p.grad.clone() for name, p in trainer.parameters.items()}
    for size in (1, 3):
        assert found[size][0] == pytest.approx(found[4][0], rel=1e-5)
        for name, wanted in found[4][1].items():
            assert torch.allclose(found[size][1][name], wanted, atol=1e-6, rtol=1e-4), (size, name)
    marks.zero_()
    report = trainer.step(0)  # nothing to learn in a whole step
    assert report.loss == 0.0 and all(not p.grad.isnan().any() for p in trainer.parameters.values())


def test_align_counts_documents_alone(opened):
    """Every token of a chat, and none of the room behind."""
    session, student = opened
    stage = Align(session.teacher, student, Align.Options(tokens=1, lr=1e-3))
    last = session.windows.batch(0, session.windows.count)
    row = int((last.labels < 0).sum(1).argmax())
    batch, room = last.rows(slice(row, row + 1)), int((last.labels[row] < 0).sum())
    assert room and stage.size(batch) == batch.ids.shape[1] - room
    losses = [loss.item() for _, loss in stage.losses(batch)]
    cut = batch.shortened(batch.ids.shape[1] - room)
    assert losses == pytest.approx([loss.item() for _, loss in stage.losses(cut)], rel=1e-4)


def test_fidelity_on_completions(opened):
    """KL, agreement and bits a byte by hand, and the table's columns; none of plain text."""
    session, student = opened
    heldout = session.heldout(768)
    found = fidelity(session.teacher, student, heldout)["completions"]
    kl, same, nll, said = [], [], [], 0
    for batch in heldout.batches:
        ours, theirs = log_probabilities(student, batch), log_probabilities(None, batch, session.teacher)
        at = batch.trained > 0
        kl.append((theirs.exp() * (theirs - ours)).sum(-1)[at])
        same.append((ours.argmax(-1) == theirs.argmax(-1))[at].float())
        nll.append(-ours.gather(-1, batch.targets[..., None])[..., 0][at])
        said += len(session.teacher.tokenizer.decode(batch.targets[at].tolist(), skip_special_tokens=True).encode())
    assert found["tokens"] == sum(map(len, kl)) and found["bytes"] == said
    assert found["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    assert found["agreement"] == pytest.approx(torch.cat(same).mean().item(), abs=1e-6)
    assert found["bits_per_byte"] == pytest.approx(torch.cat(nll).sum().item() / math.log(2) / said, rel=1e-4)
    judged = {"rows": {"student": {"fidelity": fidelity(session.teacher, student, heldout)}}}
    judged["rows"]["teacher"] = {"fidelity": fidelity(session.teacher, None, heldout)}
    assert records.Fidelity(**judged["rows"]["student"]["fidelity"]).completions.kl == found["kl"]
    tables = dict(Fidelity().tables(judged))
    (table,) = (table for title, table in tables.items() if title.startswith("fidelity on what the assistant said"))
    assert [next(iter(column.cells)) for column in table.columns][2:] == [
        f"{found['agreement']:.1%}",
        f"{found['nll']:.3f}",
        f"{found['bits_per_byte']:.3f}",
        f"{found['tokens']:,}",
    ]
    columns, cells = headline_cells(judged)
    at = columns.index("KL on completions")
    assert cells["student"][at] == f"{found['kl']:.3f}" and cells["teacher"][at] == "0.000"
    assert len(cells["student"]) == len(columns) and cells["student"][at + 2] == f"{found['bits_per_byte']:.3f}"


@pytest.fixture
def short(chat_recipe):
    """Initialise and imitate alone, on completions."""
    options = {"tokens": 1152, "lr": 1e-3, "train": "mixers", "ce": 0.1}
    chat_recipe["stages"] = [chat_recipe["stages"][0], {"imitate": options}]
    return chat_recipe


def test_a_run_resumes_to_the_same_bits(short, tmp_path, monkeypatch):
    """Stopped after each step; its table has completions, and what is long is said."""
    written = io.StringIO()
    lines = Path(short["data"]["train"][0]["path"]).read_text()
    row = {"messages": [{"role": "user", "content": "x " * 200}, {"role": "assistant", "content": "y"}]}
    (tmp_path / "longer.jsonl").write_text(lines + json.dumps(row))
    short["data"]["train"] = [{"path": str(tmp_path / "longer.jsonl")}]
    whole = distill.run(short, runs=tmp_path / "whole", console=Console(file=written, width=300))
    assert "data.train: 1 chat is longer than 96 tokens: 0 cut at the end of a turn, 1 not read" in written.getvalue()
    assert "KL on completions" in written.getvalue() and "KL on completions" in (whole.path / "report.html").read_text()
    stops = 0
    while True:
        left = iter([None, "enough"] + [None] * 1000)
        monkeypatch.setattr(Stopper, "due", lambda self, left=left: next(left))
        try:
            again = distill.run(short, runs=tmp_path / "parts", console=Console(quiet=True))
            break
        except Interrupted:
            stops += 1
    one, two = (load_file(run.path / "student" / "model.safetensors") for run in (whole, again))
    assert stops >= 1 and all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_are_one(short, tmp_path, opened):
    """Whose windows hold other numbers of completions: gradients and losses of the same step."""
    gradients_of, losses = gradients(tmp_path, short, "imitate", processes=2)
    session, student = opened
    stage = Imitate(session.teacher, student, Imitate.Options(tokens=1, lr=1e-3, clip=None))
    stage.prepare()
    trainer = Trainer(stage, session.accelerator, session.windows, 0, 4, 4)
    trainer.optimizer.step = trainer.optimizer.zero_grad = lambda **keywords: None
    counts = [session.windows.batch(first, 2).trained.sum().item() for first in (0, 2)]
    assert counts[0] != counts[1] and trainer.step(0).losses == pytest.approx(losses, rel=1e-5)
    for name, parameter in trainer.parameters.items():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, gradients_of[name], atol=1e-5, rtol=1e-3), name


def test_cached_logits_serve_completions(short, tmp_path, monkeypatch):
    """A cache is of every token of its windows, so that it serves a training on completions."""
    short["stages"][1]["imitate"]["ce"] = 0.0
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(short))
    distill.cache(tmp_path / "r.yaml", out=tmp_path / "logits", top_k=319, console=Console(quiet=True))
    session = Session.open(check(short, "here"))
    student, _ = build(session.teacher, Layout("AMAM", {"M": session.recipe.mixers["M"]}))
    stage = Imitate(session.teacher, student, Imitate.Options(tokens=1, lr=1e-3))
    batch = session.windows.batch(3, 3)  # those that the stage reads
    ((_, online),) = stage.losses(batch)
    stage.learn_from(Cached(LogitCache(tmp_path / "logits", "here")))
    ((_, offline),) = stage.losses(batch)
    assert offline.item() == pytest.approx(online.item(), rel=1e-2)
    unmarked = Batch(**{**vars(batch), "trained": None})
    assert offline.item() != pytest.approx(next(loss.item() for _, loss in stage.losses(unmarked)), rel=1e-2)


def test_fingerprints_of_before(chat_recipe):
    """A recipe that says nothing of train_on keeps its runs; one that does is another."""
    before = check(chat_recipe, "here").fingerprint
    chat_recipe["data"]["train"][0]["train_on"] = "completions"
    assert check(chat_recipe, "here").fingerprint != before
    chat_recipe["data"]["train"][0]["train_on"] = "answers"
    with pytest.raises(UserError, match="train_on is 'answers'"):
        check(chat_recipe, "here")


def test_a_teacher_without_a_template(chat_recipe, tiny_teacher, tmp_path):
    chat_recipe["teacher"] = str(tiny_teacher)
    said = r"data.heldout.0: .*held.jsonl, line \d+: the teacher's tokenizer has no chat template.*; name a teacher"
    with pytest.raises(UserError, match=said):
        distill.run(chat_recipe, runs=tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("*"))


def test_prepare_shows_what_is_trained_on(chat_recipe, monkeypatch, tmp_path):
    from distill.cli import app

    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "r.yaml").write_text(json.dumps(chat_recipe))
    found = CliRunner().invoke(app, ["prepare", str(tmp_path / "r.yaml"), "--show", "2"])
    assert found.exit_code == 0, found.output
    assert "tokens are trained on" in found.output and "data.train: chats, row " in found.output
    shown = found.output[found.output.index("data.train: chats, row") :]
    assert shown.count("⟦") == shown.count("⟧") > 2 and "us|er" in shown and "<end>⟧" in shown
    assert CliRunner().invoke(app, ["prepare", str(tmp_path / "r.yaml"), "--show", "-1"]).exit_code
