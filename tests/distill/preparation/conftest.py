"""Text to prepare in small shards."""

import json

import pytest

from distill.recipe import TextSource
from distill.text import pieces, shards
from distill.text.preparation import Tokenising, prepare
from tests.distill.preparation.preparing import SIZE


@pytest.fixture(autouse=True)
def small_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SIZE", SIZE)
    monkeypatch.setattr(pieces, "ROWS", 8)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A local text, a mixture of two whose first comes several times, a data set's folder, and rows of several documents."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "set").mkdir()
    for name, count in (("one", 90), ("two", 150), ("set/train-0", 60), ("set/train-1", 60), ("many", 40)):
        also = "<end>more of {0} here<end>{0}" if name == "many" else ""
        texts = [f"{name} number {row}: {'the river runs on ' * (1 + row % 7)}" for row in range(count)]
        rows = [{"text": text + also.format(text)} for text in texts] + [{"text": " "}]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = {name: str(folder / f"{name}.jsonl") for name in ("one", "two", "many")}
    return {
        "local": [TextSource(path=path["one"]), TextSource(path=path["two"])],
        "mixture": [TextSource(path=path["one"], weight=3.0), TextSource(path=path["two"], weight=1.0)],
        "set": [TextSource(hub=str(folder / "set"))],
        "set and files": [TextSource(hub=str(folder / "set")), TextSource(path=path["one"])],
        "several documents a row": [TextSource(path=path["many"])],
    }


@pytest.fixture
def prepared(tokenizer, tmp_path, monkeypatch):
    """Prepare in a cache of this name."""

    def prepared(sources, cache, processes=1, limit=None, **options):
        monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / cache))
        options |= {"separator": None, "seed": 3, "limit": limit, "where": "data.train", "how": Tokenising(processes)}
        return prepare(sources, tokenizer, **options)

    return prepared
