"""Cached logits: what is cached, resuming, refusals, and training from a cache."""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.numpy import load_file, save_file

import distill
from distill import cli
from distill.build import build
from distill.errors import Interrupted, UserError
from distill.logits import writer
from distill.logits.facts import FACTS
from distill.logits.reader import LogitCache
from distill.output_head import wide_head, wide_logits
from distill.recipe_file import load
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.stages import stages_of
from distill.stages.targets import Cached
from distill.text.windows import Windows
from distill.training.trainer import Trainer
from students.config import Layout
from teachers.cache import cache_folder
from teachers.teacher import Teacher
from tests.distill.test_processes import in_two

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
SEVERAL = 3 * 32 * (8 * 4 + 2)  # bytes of three windows of 32 tokens and 8 likeliest: 24 windows are 8 shards


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", SEVERAL)


@pytest.fixture
def recipe(tmp_path, tiny_recipe, monkeypatch):
    """A recipe whose imitate stage reads 24 windows and is its only training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill.evaluation.judging.EVALUATIONS", {"fidelity": ""})
    tiny_recipe["stages"] = [tiny_recipe["stages"][0], tiny_recipe["stages"][3]]
    tiny_recipe["evaluation"] |= {"passkey": [], "documents": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe))
    return tiny_recipe


@pytest.fixture
def cached(recipe):
    """The folder of a cache of the recipe's windows, `logits`."""
    return distill.cache(recipe, out="logits", top_k=8, console=QUIET).absolute()


def offline(recipe, *overrides, **rest):
    """A run of the recipe that imitates from `logits`."""
    return distill.run(recipe, overrides=["stages.imitate.offline_logits=logits", *overrides], console=QUIET, **rest)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# what is cached


def test_what_is_written(recipe, cached):
    """The windows that the stage reads, each once, and of each the teacher's own numbers."""
    session = Session.open(load(recipe))
    cache, facts = LogitCache(cached, "here"), json.loads((cached / FACTS).read_text())
    assert facts["teacher"] == session.teacher.fingerprint and facts["text"] == session.windows.meta.sha256
    assert (facts["top_k"], facts["temperature"], facts["vocabulary"], facts["seq_len"]) == (8, 1.0, 320, 32)
    batch = session.windows.batch(8, 24)  # initialise reads 8 before
    assert cache.count == 24 and len(list(cached.glob("*.safetensors"))) == 8
    known = cache.known(batch.windows.tolist())
    hidden = session.teacher.hidden(batch.ids, batch.positions)
    logs = wide_logits(hidden.flatten(0, 1), wide_head(session.teacher.model)).log_softmax(-1).unflatten(0, (24, 32))
    wanted, ids = logs.topk(8)
    assert torch.equal(known.ids, ids)
    torch.testing.assert_close(known.logs.float(), wanted, rtol=1e-3, atol=1e-6)
    rest = logs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(known.rest.float(), rest, rtol=1e-3, atol=1e-6)
    arrays = load_file(next(cached.glob("*.safetensors")))
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "ids": "uint16", "logs": "float16", "rest": "float16"
    }  # fmt: skip


def test_temperature_is_cached(recipe):
    folder = distill.cache(recipe, overrides="stages.imitate.temperature=2.0", out="warm", top_k=8, console=QUIET)
    cold = distill.cache(recipe, top_k=8, console=QUIET)  # into the project's cache, by what it holds
    assert cold.parent == cache_folder() / "logits"
    first = {name: LogitCache(place, "x") for name, place in (("warm", folder), ("cold", cold))}
    place = json.loads((folder / "shard-00000.json").read_text())["windows"][:1]
    warm, usual = first["warm"].known(place), first["cold"].known(place)
    assert torch.equal(warm.ids, usual.ids) and (warm.logs[..., 0] < usual.logs[..., 0]).all()


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(("first", "count"), [(0, 7), (5, 40), (30, 200), (13, 0)])
def test_each_window_once(recipe, in_order, first, count):
    """The places of windows over several epochs, in the order in which they come first, as batches have them."""
    windows = Session.open(load(recipe)).windows
    windows = Windows(windows.folder, 16, 3, in_order)
    found = windows.places(first, count)
    read = windows.batch(first, count).windows.tolist() if count else []
    assert found.tolist() == list(dict.fromkeys(read))
    if count:
        batch = windows.at(found[:2])
        assert batch.windows.tolist() == found[:2].tolist()
        assert torch.equal(batch.ids[0], windows.batch(first, 1).ids[0])


def test_twins_windows_are_cached_too(recipe):
    """A twin has no orient, so its imitate begins elsewhere; both run without a teacher in their steps."""
    stages = [*recipe["stages"]]
    stages.insert(1, {"orient": {"tokens": 300, "lr": 1e-3, "calibration_tokens": 128}})
    stages.insert(2, {"align": {"tokens": 256, "lr": 1e-3}})
    twin = recipe | {"stages": stages, "twin": True}
    distill.cache(twin, out="logits", top_k=8, console=QUIET)
    assert offline(twin).read("run.json")["finished"]


# going on


def test_stopped_and_gone_on_with(recipe, cached, monkeypatch):
    """Stopped in a shard, damaged, short and cut: the same command ends with the same bytes."""
    wanted = contents(cached)
    asked = iter(range(1000))
    with (
        monkeypatch.context() as patch,
        pytest.raises(Interrupted, match=r"enough. What is written is kept, and the same command continues"),
    ):
        patch.setattr(Stopper, "due", lambda self: "enough" if next(asked) == 3 else None)
        distill.cache(recipe, out="other", top_k=8, console=QUIET)
    other = cached.parent / "other"
    assert len(list(other.glob("shard-*.json"))) == 3 and not list(other.glob("*~"))
    (other / "shard-00003.safetensors").write_bytes(b"killed before its .json was written")
    assert contents(distill.cache(recipe, out="other", top_k=8, console=QUIET)) == wanted


def test_damaged_shards_are_made_again(recipe, cached, capsys):
    whole = {tuple(place) for place in [sorted(_windows(cached))]}
    flip(cached / "shard-00002.safetensors")
    (cached / "shard-00004.safetensors").unlink()
    (cached / "shard-00005.json").write_text("{")
    distill.cache(recipe, out="logits", top_k=8, console=Console(file=sys.stderr, width=300))
    said = capsys.readouterr().err
    assert said.count("its windows are made again") == 3 and "15 already there" in said
    assert {tuple(sorted(_windows(cached)))} == whole
    assert offline(recipe).read("run.json")["finished"]


def _windows(folder):
    return [place for file in folder.glob("shard-*.json") for place in json.loads(file.read_text())["windows"]]


def flip(file):
    """Change the last byte of a file."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_longer_recipe_adds_what_it_needs(recipe, cached):
    before = contents(cached)
    distill.cache(recipe, overrides="stages.imitate.tokens=1280", out="logits", top_k=8, console=QUIET)
    after = contents(cached)
    assert all(after[name] == content for name, content in before.items()) and len(_windows(cached)) == 40
    assert len(set(_windows(cached))) == 40


class Full:
    """A file on a disk that is full."""

    def write(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_loses_nothing(recipe, tmp_path, monkeypatch):
    """Full while it writes, and full before: the message says so, and what was written is gone on with."""
    usual, folder = writer.new_file, tmp_path / "logits"

    @contextmanager
    def new_file(target):
        with usual(target) as opened:
            yield Full() if target.name == "shard-00002.safetensors" else opened

    def cache():
        return distill.cache(recipe, out=folder, top_k=8, console=QUIET)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "new_file", new_file)
        with pytest.raises(
            UserError, match=r"shard-00002.safetensors cannot be written: No space left.* same command again"
        ):
            cache()
    assert len(_windows(folder)) == 6
    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
        with pytest.raises(
            UserError, match=r"the logits of 18 windows take .* KiB, and 1000 bytes are free; make room there"
        ):
            cache()
    assert len(_windows(cache())) == 24


def test_two_processes_divide_the_shards(recipe, cached, tmp_path, monkeypatch):
    """Every shard once, the same windows and numbers as of one process."""
    monkeypatch.chdir(ROOT)  # which `in_two` lets Python import from
    place = tmp_path / "two"
    code, said = in_two("-m", "distill.cli", "cache", str(tmp_path / "tiny.yaml"), "--out", str(place), "--top-k", "8")
    assert code == 0, said
    two = LogitCache(place, "x")
    one = LogitCache(cached, "x")
    assert two.count == 24 and len(set(_windows(two.folder))) == len(_windows(two.folder))
    places = sorted(_windows(cached))
    for ours, theirs in zip(two.known(places), one.known(places), strict=True):
        assert torch.equal(ours, theirs)


# what is refused: overrides of the run, what is done to the folder, and the message

RUNS = {
    "temperature": (["stages.imitate.temperature=2.0"], "the temperature is 1.0 there, and 2.0 here.*temperature=1.0"),
    "seq_len": (["data.seq_len=16"], "the windows' length is 32 there, and 16 here.*data.seq_len=32"),
    "seed": (["seed=1"], "the seed is 0 there, and 1 here.*set seed=0"),
    "order": (["data.long_documents=in_order"], "data.long_documents is shuffled there, and in_order here"),
    "windows": (["stages.imitate.tokens=1280"], "has 24 of the 40 windows that this stage reads; add the others"),
    "none": (["stages.imitate.offline_logits=nowhere"], "is nowhere, which is not a cache of logits: it has no cache.json"),
    "divergence": (["stages.imitate.divergence=reverse_kl"], "divergence is 'reverse_kl', but offline_logits hold"),
    "jsd": (["stages.imitate.divergence=jsd"], "divergence is 'jsd', but offline_logits hold"),
    "hidden": (["stages.imitate.hidden=0.5"], "hidden is 0.5, and offline_logits hold no hidden states"),
    "teacher": (["stages.imitate.teacher=larger"], "holds the logits of .*, but the stage's teacher is larger"),
}


@pytest.mark.parametrize("case", RUNS)
def test_caches_of_something_else_are_refused(recipe, cached, case):
    overrides, said = RUNS[case]
    with pytest.raises(UserError, match=said) as refused:
        offline(recipe, *overrides)
    assert "stages.imitate" in str(refused.value) and not (cached.parent / "runs").exists()


def test_another_text_tokenizer_or_teacher(recipe, cached, tmp_path):
    words = (tmp_path / "words.jsonl").absolute()
    words.write_text("".join(json.dumps({"text": f"{n} other words {n * n} " * 40}) + "\n" for n in range(30)))
    with pytest.raises(UserError, match=r"stages.imitate.offline_logits is logits, a cache of another training text"):
        offline(recipe, f"data.train=[{{path: {words}}}]")
    other = shutil.copytree(recipe["teacher"], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: weights[name] * 2}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"a cache of another teacher \(.*; they differ in the weights\)"):
        offline(recipe, f"teacher={other}")
    swapped = shutil.copytree(recipe["teacher"], tmp_path / "swapped")
    file = swapped / "tokenizer.json"
    said = json.loads(file.read_text())
    vocabulary = said["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(said))
    with pytest.raises(UserError, match="a cache of another tokenizer"):
        offline(recipe, f"teacher={swapped}")


DAMAGE = {
    "missing": (lambda place: (place / "shard-00001.safetensors").unlink(), "shard-00001.safetensors cannot be read"),
    "cut": (
        lambda place: (place / "shard-00001.safetensors").write_bytes(b"short"),
        r"shard-00001.safetensors is damaged: it has 5 bytes",
    ),
    "altered": (lambda place: flip(place / "shard-00001.safetensors"), "is damaged .it is not what was written there"),
    "foreign": (
        lambda place: change(place / "shard-00001.json", of="0" * 64),
        "shard-00001.json is of another cache than logits",
    ),
    "both gone": (
        lambda place: [file.unlink() for file in place.glob("shard-00001.*")],
        "has 21 of the 24 windows that this stage reads",
    ),
    "facts": (lambda place: (place / FACTS).write_text("{}"), "cache.json is damaged"),
    "no rest": (
        lambda place: change(place / FACTS, top_k=320),
        "cache.json is damaged .top_k is 320 of a vocabulary of 320",
    ),
    "far": (
        lambda place: change(place / "shard-00001.json", windows=[10**17]),
        "has 21 of the 24 windows that this stage reads",
    ),
    "no json": (lambda place: (place / "shard-00001.json").write_text("]"), "shard-00001.json is damaged"),
}


def change(file, **entries):
    """Other values of a JSON file's entries."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(recipe, cached, case, monkeypatch, capsys):
    """One message, exit code 2; and but for cache.json, `distill cache` mends it."""
    damage, said = DAMAGE[case]
    damage(cached)
    command = ["distill", "run", "tiny.yaml", "stages.imitate.offline_logits=logits"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.entry()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and re.search(said, error), error
    if case not in ("facts", "no rest"):
        distill.cache(recipe, out="logits", top_k=8, console=QUIET)
        cache = LogitCache(cached, "x")
        assert cache.count == 24 and cache.known(_windows(cached)).rest.shape == (24, 32)


def test_tokens_beyond_the_vocabulary_are_refused(cached):
    """Rightly hashed, and still no distribution: nothing is gathered beyond an array's end."""
    file, facts = cached / "shard-00000.safetensors", cached / "shard-00000.json"
    arrays = load_file(file)
    save_file(arrays | {"ids": np.full_like(arrays["ids"], 999)}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    said = json.loads(facts.read_text()) | {"sha256": digest, "bytes": file.stat().st_size}
    facts.write_text(json.dumps(said))
    cache = LogitCache(cached, "x")
    with pytest.raises(UserError, match=r"shard-00000.safetensors is damaged .its numbers are not a distribution"):
        cache.known(said["windows"][:1])


def test_what_cannot_be_cached(recipe, cached):
    with pytest.raises(UserError, match="--top-k is 320, but the vocabulary has 320 tokens; give a smaller"):
        distill.cache(recipe, top_k=320, console=QUIET)
    with pytest.raises(UserError, match="--top-k is 0; it takes a whole number from 1"):
        distill.cache(recipe, top_k=0)
    with pytest.raises(UserError, match="number of likeliest tokens is 8 there, and 9 here; name another folder with --out"):
        distill.cache(recipe, out="logits", top_k=9, console=QUIET)
    (cached.parent / "mine").mkdir()
    (cached.parent / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="--out is mine, which holds something other than a cache of logits"):
        distill.cache(recipe, out="mine", top_k=8, console=QUIET)
    alone = recipe | {"stages": [recipe["stages"][0], {"align": {"tokens": 128, "lr": 1e-3}}]}
    with pytest.raises(UserError, match="none of the stages compares next-token distributions"):
        distill.cache(alone, console=QUIET)
    twice = recipe | {"stages": [*recipe["stages"], {"imitate": {"tokens": 128, "lr": 1e-3, "temperature": 2.0}}]}
    with pytest.raises(UserError, match=r"the stages 1 \(imitate\), 2 \(imitate\) have different .*; give the number"):
        distill.cache(twice, console=QUIET)
    with pytest.raises(UserError, match=r"--stage is 7, but the stages of tiny that can be cached are 1 \(imitate\), 2"):
        distill.cache(twice, stage=7, console=QUIET)
    assert LogitCache(distill.cache(twice, stage=2, out="second", top_k=8, console=QUIET), "x").count == 4


# a training that reads them


def test_no_teacher_runs_in_its_steps(recipe, cached, monkeypatch):
    running, calls = [], []
    step, hidden = Trainer.step, Teacher.hidden

    def stepping(self, number):
        running.append(1)
        try:
            return step(self, number)
        finally:
            running.pop()

    def asked(self, *arguments):
        calls.append(bool(running))
        return hidden(self, *arguments)

    monkeypatch.setattr(Trainer, "step", stepping)
    monkeypatch.setattr(Teacher, "hidden", asked)
    folder = offline(recipe)
    assert calls and not any(calls)
    steps = [line for line in folder.metrics() if line["stage"] == "imitate"]
    assert len(steps) == 6 and all(line["kl_lower_bound"] == line["loss"] for line in steps)


def test_all_but_one_token_is_the_whole(recipe):
    """With one token as the rest the loss is the KL, but for what float16 rounds, ce and temperature included."""
    over = ["stages.imitate.ce=0.2", "stages.imitate.temperature=1.5"]
    folder = distill.cache(recipe, overrides=over, out="logits", top_k=319, console=QUIET)
    session = Session.open(load(recipe, over))
    student, _ = build(session.teacher, Layout.over(4, "AM", recipe["mixers"]))
    (entry,) = [one for one in stages_of(session.recipe) if one.name == "imitate"]
    stage, batch = entry.make(session.teacher, student), session.windows.batch(8, 24)
    stage.prepare()
    (_, whole), gradients = next(iter(stage.losses(batch))), []
    stage.learn_from(Cached(LogitCache(folder, "x")))
    (_, found) = next(iter(stage.losses(batch)))
    for loss in (whole, found):
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p for _, p in stage.trained().values()])])
        )
    assert found.item() == pytest.approx(whole.item(), rel=1e-3) and found.item() != whole.item()
    assert (gradients[1] - gradients[0]).norm() < 1e-2 * gradients[0].norm()


def test_goes_on_with_the_same_cache_alone(recipe, cached, monkeypatch):
    """Stopped after two steps: refused with a cache of another form, the same bits with its own."""
    whole = offline(recipe, runs="whole")
    asked = iter(range(1000))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Stopper, "due", lambda self: "enough" if next(asked) == 1 else None)
        offline(recipe)
    cached.rename("kept")
    distill.cache(recipe, out="logits", top_k=9, console=QUIET)
    with pytest.raises(UserError, match="the cache of logits of stage imitate is not the one that it began with"):
        offline(recipe)
    shutil.rmtree("logits")
    Path("kept").rename("logits")
    done = offline(recipe)
    found, wanted = (load_file(folder.student / "model.safetensors") for folder in (done, whole))
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_recipe_without_these_keys_keeps_its_run(recipe):
    """And one that has them has a run of its own."""
    before = load(recipe).fingerprint
    assert load(recipe, "stages.imitate.offline_logits=logits").fingerprint != before
    assert load(recipe, "stages.imitate.teacher=x").fingerprint != before
