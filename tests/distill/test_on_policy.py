"""On-policy distillation: the part of a window that the student writes, its loss, resuming, and two processes."""

import json
import math

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

import distill
from distill.build import build
from distill.errors import Interrupted, UserError
from distill.recipe_file import check
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.stages.imitate import Imitate
from distill.stages.on_policy import written
from distill.training.trainer import Trainer
from students.config import Layout
from students.kernels.linear_kl import Head, linear_kl
from students.static_cache import GraphError
from tests import trl_gkd
from tests.distill.two_processes import in_two

QUIET = Console(quiet=True)
STORED = json.loads(trl_gkd.FILE.read_text())["losses"]


@pytest.fixture
def opened(chat_recipe):
    """A session on chats and an untrained student."""
    recipe = check(chat_recipe, "here")
    session = Session.open(recipe)
    return session, build(session.teacher, Layout("AMAM", {"M": recipe.mixers["M"]}))[0]


def documents(batch, window):
    """The columns of each document of a window, room left out."""
    real = batch.labels[window] >= 0
    return [((batch.documents[window] == one) & real).nonzero()[:, 0] for one in batch.documents[window][real].unique()]


def test_what_the_student_writes(opened):
    """Prompts stay; behind them stands what the student says, token by token as it would go on, and the rest is room."""
    session, student = opened
    batch = session.windows.batch(0, 3)
    torch.manual_seed(1)
    found = written(batch, student, 1.0)
    assert (found.labels >= 0).sum() <= (batch.labels >= 0).sum() and found.windows is None
    likely, count = 0.0, 0
    for window in range(3):
        assert found.documents[window][0] == 0 and (found.documents[window].diff() >= 0).all()
        for before in documents(batch, window):
            start = int(before[0])
            asked = int(batch.trained[window][before].nonzero()[0, 0]) + 1
            begin = start + asked
            assert torch.equal(found.ids[window, start:begin], batch.ids[window, start:begin])
            assert not found.trained[window, start : begin - 1].any()
            after = (found.documents[window] == found.documents[window, start]).nonzero()[:, 0]
            stop = int(after[-1]) + 1
            assert torch.equal(found.positions[window, start:stop], torch.arange(stop - start)) and begin < stop
            said = slice(begin - 1, stop - 1)
            assert torch.equal(found.targets[window, said], found.ids[window, begin:stop])
            assert (found.trained[window, said] == 1).all() and (found.weights[window, said] == 1).all()
            logits = student(input_ids=found.ids[window, None, start:stop]).logits[0].log_softmax(-1)
            likely += logits[asked - 1 : -1].gather(1, found.targets[window, said][:, None]).sum().item()
            count += stop - begin
            over = found.labels[window, stop : int(before[-1]) + 1]
            assert (over < 0).all() and not found.trained[window, stop - 1 : int(before[-1]) + 1].any()
    assert count == found.trained.sum() and likely / count > -math.log(320) + 0.2  # likelier than what is drawn evenly


def test_the_share_is_of_windows(opened):
    session, student = opened
    batch = session.windows.batch(0, 12)
    torch.manual_seed(0)
    found = written(batch, student, 0.5)
    changed = (found.ids != batch.ids).any(1)
    assert 0 < changed.sum() < 12
    for name in ("ids", "targets", "trained", "documents", "labels"):
        assert torch.equal(getattr(found, name)[~changed], getattr(batch, name)[~changed]), name
    again = dict.fromkeys((0, 3))
    for seed in again:
        torch.manual_seed(seed)
        again[seed] = written(batch, student, 0.5).ids
    assert torch.equal(again[0], found.ids) and not torch.equal(again[3], found.ids)


def test_no_decoder_no_matter(opened, monkeypatch):
    """A family that cannot be held in place writes the same by transformers' generate."""
    session, student = opened
    batch = session.windows.batch(0, 2)
    torch.manual_seed(0)
    wanted = written(batch, student, 1.0)

    def refuse(*_, **__):
        raise GraphError("not this one")

    monkeypatch.setattr("distill.stages.on_policy.replayed", refuse)
    torch.manual_seed(0)
    assert torch.equal(written(batch, student, 1.0).ids, wanted.ids)


def test_the_loss_is_the_teachers_of_what_was_written(opened):
    """Its gradient goes through the student's distribution alone; recomputed layers are no hindrance."""
    session, student = opened
    options = Imitate.Options(tokens=96, lr=1e-3, on_policy=1.0, divergence="reverse_kl", activation_checkpointing=True)
    stage = Imitate(session.teacher, student, options)
    stage.prepare()
    trainer = Trainer(stage, session.accelerator, session.windows, 0, 2, 1)
    torch.manual_seed(5)
    student.train()
    parts, sizes, whole = trainer._sized_parts(0)
    assert student.training and sum(sizes) == whole == sum(part.trained.sum().item() for part in parts)
    ((_, loss),) = stage.losses(parts[0])
    part = parts[0]
    ours = (student.hidden(part.ids, part.documents) @ student.get_output_embeddings().weight.T).log_softmax(-1)
    theirs = session.teacher.hidden(part.ids, part.positions) @ session.teacher.model.get_output_embeddings().weight.T
    theirs = theirs.log_softmax(-1)
    wanted = ((ours.exp() * (ours - theirs)).sum(-1) * part.trained).sum() / part.trained.sum()
    torch.testing.assert_close(loss, wanted)
    report = trainer.step(0)
    assert math.isfinite(report.loss) and report.gradient_norm > 0


@pytest.mark.parametrize("divergence", trl_gkd.BETAS)
def test_divergences_are_trls(divergence):
    """`trl.experimental.gkd`'s generalized_jsd_loss; tests/trl_gkd.py says how its numbers were made."""
    ours, theirs, labels = trl_gkd.logits()
    head, weights = Head(torch.eye(53)), (labels != -100).float()
    flat = [tensor.flatten(0, 1) for tensor in (ours, theirs)]
    loss = linear_kl(flat[0], head, flat[1], head, weights.flatten(), divergence=divergence)
    assert loss.item() == pytest.approx(STORED[divergence], rel=1e-5)


@pytest.mark.ecosystem
def test_trl_gives_what_is_stored():
    """TRL itself, where it is installed."""
    pytest.importorskip("trl")
    assert trl_gkd.losses() == pytest.approx(STORED, rel=1e-6)


@pytest.fixture
def on_policy(chat_recipe, monkeypatch):
    """A recipe of one training stage, on-policy in half of its windows."""
    monkeypatch.setattr("distill.evaluation.judging.EVALUATIONS", {"fidelity": ""})
    options = {"tokens": 96 * 12, "lr": 1e-3, "on_policy": 0.5, "divergence": "jsd", "batch": 4, "micro_batch": 1}
    chat_recipe["stages"] = [chat_recipe["stages"][0], {"imitate": options}]
    return chat_recipe


def weights(folder):
    return load_file(folder.path / "student" / "model.safetensors")


def test_resumes_to_the_same_bits(on_policy, tmp_path, monkeypatch):
    whole = weights(distill.run(on_policy, runs=tmp_path / "whole", console=QUIET))
    with monkeypatch.context() as patched:
        asked = iter(range(1000))
        patched.setattr(Stopper, "due", lambda self: "enough" if next(asked) == 1 else None)
        with pytest.raises(Interrupted):
            distill.run(on_policy, runs=tmp_path / "cut", console=QUIET)
    again = weights(distill.run(on_policy, runs=tmp_path / "cut", console=QUIET))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("shard", ["none", "all"])
def test_two_processes(on_policy, tmp_path, shard):
    """Replicas and parts: every process writes its own windows, and the run ends."""
    on_policy["shard"] = shard
    on_policy["stages"][1]["imitate"]["tokens"] = 96 * 8
    (tmp_path / "chats.yaml").write_text(yaml.safe_dump(on_policy))
    code, said = in_two("-m", "distill.cli", "run", str(tmp_path / "chats.yaml"), "--runs", str(tmp_path / "runs"))
    assert code == 0, said
    (metrics,) = tmp_path.glob("runs/*/metrics.jsonl")
    losses = [json.loads(line).get("loss") for line in metrics.read_text().splitlines()]
    assert losses and all(math.isfinite(loss) for loss in losses if loss is not None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ce": 0.1}, r"on_policy is 0.5: the student writes answers, and ce is 0.1, and would train it on its own words"),
        ({"offline_logits": "x"}, r"on_policy is 0.5: the student writes answers, and offline_logits hold nothing for"),
        ({"on_policy": 1.5}, r"on_policy"),
    ],
)
def test_refused(chat_recipe, options, message):
    chat_recipe["stages"][-1] = {"imitate": {"tokens": 96, "lr": 1e-3, "on_policy": 0.5, **options}}
    with pytest.raises(UserError, match=message):
        check(chat_recipe, "here")


def test_text_without_completions_is_refused(tiny_recipe):
    session = Session.open(check(tiny_recipe, "here"))
    with pytest.raises(UserError, match="on_policy is given, but the stage's text has no completions"):
        written(session.windows.batch(0, 1), session.teacher.model, 0.5)
