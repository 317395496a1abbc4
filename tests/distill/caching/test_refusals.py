"""Caches of logits that are refused: those of other runs, damaged ones, and what cannot be cached."""

import hashlib
import json
import re
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import distill
from distill import cli
from distill.errors import UserError
from distill.logits.facts import FACTS
from distill.logits.reader import LogitCache
from tests.distill.caching.caches import QUIET, _windows, flip, offline

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
