"""Text that is not there, is none, or is not what its name says."""

import errno
import json
import lzma
import os

import pytest
import yaml

import distill
from distill.errors import UserError
from distill.recipe_file import check
from distill.runs.session import Session

LINE = json.dumps({"text": "a river and a lake " * 20}) + "\n"

# file name, what it holds, further overrides, what the message must hold
SHARD = "00000/meta.json"
TEXTS = {
    "empty": ("t.jsonl", b"", [], ["data.train", "t.jsonl", "empty"]),
    "empty text": ("t.txt", b"", [], ["data.train", "t.txt"]),
    "blank lines only": ("t.txt", b"\n\n\n", [], ["data.train: there is no text in", "t.txt"]),
    "shorter than a token": ("t.jsonl", b'{"text": ""}\n' * 9, [], ["data.train: there is no text in", "t.jsonl"]),
    "shorter than a window": ("t.jsonl", b'{"text": "a b"}\n', [], ["data.seq_len is 32, but there are only", "tokens of"]),
    "binary lines": ("t.jsonl", bytes(range(256)) * 4, [], ["data.train.0: ", "t.jsonl could not be read: line 1"]),
    "binary text": (
        "t.txt",
        b"\x80\x81\xff" * 400,
        [],
        ["data.train.0: ", "t.txt, line 1, is not UTF-8 text"],
    ),
    "half a line": ("t.jsonl", LINE.encode()[:30], [], ["data.train.0: ", "t.jsonl could not be read: line 1"]),
    "a bad line": (
        "t.jsonl",
        LINE.encode() * 6 + b'{"text": \n',
        [],
        ["data.train.0: ", "could not be read: line 7: Expecting"],
    ),
    "no JSON": ("t.jsonl", b"a river and a lake\n", [], ["data.train.0: ", "t.jsonl could not be read: line 1"]),
    "corrupt parquet": ("t.parquet", b"PAR1" + b"\0" * 200, [], ["data.train.0: ", "t.parquet could not be read"]),
    "half an archive": ("t.jsonl.xz", lzma.compress(LINE.encode() * 99)[:-40], [], ["data.train", "t.jsonl.xz"]),
    "an unknown kind": ("t.bin", b"text", [], ["data.train.0: ", "t.bin is not a file of text", "read from jsonl, json"]),
    "the wrong column": ("t.jsonl", b'{"body": "a", "title": "b"}\n', [], ["there is no column 'text'", "body", "title"]),
    "a column that is not there": (
        "t.jsonl",
        LINE.encode(),
        ["data.train.0.column=txt"],
        ["data.train.0: there is no column 'txt'", "text"],
    ),
    "numbers for text": ("t.jsonl", b'{"text": 5}\n' * 9, [], ["data.train", "text"]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_files(place, tmp_path, monkeypatch, refuse, name):
    file, content, overrides, parts = TEXTS[name]
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / file).write_bytes(content)
    refuse(place, ["run", "tiny.yaml", f"data.train.0.path={tmp_path / file}", *overrides], parts)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data.train.0.path=gone/*.jsonl"], ["data.train.0: no file matches 'gone/*.jsonl'", "looked from"]),
        (["data.heldout.0.path=gone.txt"], ["data.heldout.0: no file matches 'gone.txt'"]),
        (["data.train.0.path=runs"], ["data.train", "runs"]),
        (["data.train.0.hub=org/x"], ["data.train.0: a source of text needs either path or hub"]),
        (["data.train.0={}"], ["data.train.0: a source of text needs either path or hub"]),
        (["data.train.0={hub: org/none}"], ["data.train.0: org/none could not be read"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else None,
)
def test_sources(place, refuse, overrides, parts):
    refuse(place, ["run", "tiny.yaml", *overrides], parts)


def test_a_cache_that_cannot_be_written(place, tmp_path, monkeypatch, refuse, text_files):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "file" / "cache"))
    refuse(place, ["run", "tiny.yaml"], ["data.heldout could not be prepared", "Not a directory", "set DISTILL_CACHE"])


def test_a_disk_that_fills_while_text_is_prepared(place, small_disk, monkeypatch, refuse):
    (small_disk / "filler").write_bytes(b"x" * 390_000)
    monkeypatch.setenv("DISTILL_CACHE", str(small_disk / "cache"))
    refuse(place, ["run", "tiny.yaml"], ["data.heldout could not be prepared", os.strerror(errno.ENOSPC), "DISTILL_CACHE"])
    assert not list((small_disk / "cache" / "prepared").iterdir()), "half a folder was left behind"


@pytest.mark.parametrize(
    ("file", "damage", "parts"),
    [
        (SHARD, lambda meta: [], ["meta.json is [], not an object"]),
        (SHARD, lambda meta: meta | {"tokens": "many"}, ["meta.json: tokens is 'many'", "integer"]),
        (SHARD, lambda meta: meta | {"documents": 10**30}, ["meta.json: documents is 1"]),
        (SHARD, lambda meta: meta | {"files": {"../../tiny.yaml": meta["sha256"]}}, ["meta.json names the files"]),
        (
            SHARD,
            lambda meta: {key: value for key, value in meta.items() if key != "labels"},
            ["meta.json: labels is missing"],
        ),
        ("meta.json", lambda meta: meta | {"shards": []}, ["meta.json: shards is []"]),
        ("meta.json", lambda meta: meta | {"tokens": meta["tokens"] + 1}, ["its shards hold"]),
        ("meta.json", lambda meta: meta | {"sha256": "x"}, ["meta.json: sha256 is 'x'"]),
    ],
    ids=[
        "no object",
        "text for a number",
        "a huge number",
        "other files",
        "a key gone",
        "no shards",
        "other counts",
        "no hash",
    ],
)
def test_a_cache_that_says_something_else(place, tmp_path, monkeypatch, refuse, file, damage, parts):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    session = Session.open(check(yaml.safe_load((place / "tiny.yaml").read_text()), "tiny.yaml"), trains=False)
    meta = session.heldout_windows.folder / file
    meta.write_text(json.dumps(damage(json.loads(meta.read_text()))))
    refuse(place, ["run", "tiny.yaml"], ["the prepared text in", "is damaged", *parts, "delete ", "makes it again"])


def test_the_python_api_says_the_same(place):
    with pytest.raises(UserError, match=r"data\.heldout\.0: no file matches 'gone'"):
        distill.run("tiny.yaml", overrides=["data.heldout.0.path=gone"], runs="runs")
