"""Caching logits: what is cached, and resuming."""

import errno
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file

import distill
from distill.errors import Interrupted, UserError
from distill.logits import writer
from distill.logits.facts import FACTS
from distill.logits.reader import LogitCache
from distill.output_head import wide_head, wide_logits
from distill.recipe_file import load
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.text.windows import Windows
from teachers.cache import cache_folder
from tests.distill.caching.caches import QUIET, _windows, contents, flip, offline
from tests.distill.two_processes import in_two

ROOT = Path(__file__).parents[3]


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
