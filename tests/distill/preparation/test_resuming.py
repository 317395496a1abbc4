"""Text in shards: the same bytes for every number of processes and after interruptions."""

import json
import os

import pytest

from distill.recipe import TextSource
from distill.text import pieces
from distill.text.prepared import load
from tests.distill.preparation.preparing import KINDS, SIZE, content, stopping


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_whatever_the_processes(prepared, sources, kind):
    one, three = (prepared(sources[kind], f"by {count}", count) for count in (1, 3))
    assert content(one) == content(three)
    text = load(one)
    assert len(text.shards) > 3 and all(SIZE <= shard.counts.tokens < SIZE + 200 for shard in text.shards[:-1])
    assert (
        sorted(path.name for path in one.iterdir())[-1] == "meta.json" and len(list(one.iterdir())) == len(text.shards) + 1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_preparation_goes_on(prepared, sources, kind, monkeypatch, tmp_path):
    """From every shard on, to the same bytes; rows whose documents are all in whole shards are not tokenised again."""
    whole = prepared(sources[kind], "whole")
    text = load(whole)
    for after in (0, 3, text.meta.documents // 2, text.meta.documents - 1):
        with pytest.raises(KeyboardInterrupt):
            again = stopping(monkeypatch, after)
            prepared(sources[kind], "parts", 2)
        again()
        done = sum(shard.first_document + shard.counts.documents <= after for shard in text.shards)
        left = list((tmp_path / "parts" / "prepared").glob(".unfinished-*/0*"))
        assert len(left) == done and not list((tmp_path / "parts").rglob(".writing"))
    seen, encode = [], pieces._ids
    monkeypatch.setattr(pieces, "_ids", lambda made, texts, **options: seen.extend(texts) or encode(made, texts, **options))
    parts = prepared(sources[kind], "parts")
    assert content(parts) == content(whole)
    rest = sum(shard.counts.documents for shard in text.shards[done:])
    assert len(seen) <= rest + 2 * pieces.ROWS < text.meta.documents  # the tokenizer is also asked how texts open


def test_what_was_read_of_files_is_not_read_again(prepared, sources, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        again = stopping(monkeypatch, 100)
        prepared(sources["local"], "parts")
    again()
    monkeypatch.setattr("distill.text.sources.read", lambda *given: pytest.fail("a file was read again"))
    assert len(load(prepared(sources["local"], "parts")).shards) > 3


def test_a_limit_counts_over_shards_and_attempts(prepared, sources, monkeypatch):
    whole = prepared(sources["mixture"], "whole", limit=2000)
    with pytest.raises(KeyboardInterrupt):
        again = stopping(monkeypatch, load(whole).meta.documents // 2)
        prepared(sources["mixture"], "parts", limit=2000)
    again()
    assert content(prepared(sources["mixture"], "parts", limit=2000)) == content(whole)
    assert 2000 <= load(whole).tokens < 2100


def test_files_that_changed_between_two_attempts(prepared, tmp_path, monkeypatch):
    """The text of the first attempt is no part of the second's, though its content is what it was when it was named."""
    file = tmp_path / "x.jsonl"
    rows = "".join(json.dumps({"text": f"row {n} " * 30}) + "\n" for n in range(40))
    file.write_text(rows)
    with pytest.raises(KeyboardInterrupt):
        again = stopping(monkeypatch, 30)
        prepared([TextSource(path=str(file))], "parts")
    again()
    (left,) = (tmp_path / "parts" / "prepared").glob(".unfinished-*")
    (left / "00000" / "meta.json").write_text("not what was written")
    os.utime(file, ns=(1, 1))
    assert content(prepared([TextSource(path=str(file))], "parts")) == content(
        prepared([TextSource(path=str(file))], "whole")
    )


def test_what_nobody_goes_on_with_goes(prepared, sources, monkeypatch, tmp_path):
    """Parts of other texts stay for a month; what has none goes at once."""
    place = tmp_path / "cache" / "prepared"
    for name in ("old", "new", "empty"):
        (place / f".unfinished-{name}" / ("reading" if name == "empty" else "00000")).mkdir(parents=True)
    os.utime(place / ".unfinished-old", (1, 1))
    prepared(sources["local"], "cache")
    assert [path.name for path in place.glob(".unfinished-*")] == [".unfinished-new"]
