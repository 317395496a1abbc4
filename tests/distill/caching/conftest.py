"""A recipe and the cached logits of its windows, in small shards."""

import pytest
import yaml

import distill
from distill.logits import writer
from tests.distill.caching.caches import QUIET, SEVERAL


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
