"""Text that is not there, is none, or is not what its name says."""

import json
import lzma

import numpy as np
import pytest

import distill
from distill.errors import UserError

LINE = json.dumps({"text": "a river and a lake " * 20}) + "\n"

# file name, what it holds, further overrides, what the message must hold
TEXTS = {
    "empty": ("t.jsonl", b"", [], ["data.train", "t.jsonl", "empty"]),
    "empty text": ("t.txt", b"", [], ["data.train", "t.txt"]),
    "blank lines only": ("t.txt", b"\n\n\n", [], ["data.train: there is no text in", "t.txt"]),
    "shorter than a token": ("t.jsonl", b'{"text": ""}\n' * 9, [], ["data.train: there is no text in", "t.jsonl"]),
    "shorter than a window": ("t.jsonl", b'{"text": "a b"}\n', [], ["data.seq_len is 32, but there are only", "tokens of"]),
    "binary lines": ("t.jsonl", bytes(range(256)) * 4, [], ["data.train.0: ", "t.jsonl could not be read"]),
    "binary text": ("t.txt", b"\x80\x81\xff" * 400, [], ["data.train.0: ", "t.txt could not be read"]),
    "half a line": ("t.jsonl", LINE.encode()[:30], [], ["data.train.0: ", "t.jsonl could not be read"]),
    "no JSON": ("t.jsonl", b"a river and a lake\n", [], ["data.train.0: ", "t.jsonl could not be read"]),
    "corrupt parquet": ("t.parquet", b"PAR1" + b"\0" * 200, [], ["data.train.0: ", "t.parquet could not be read"]),
    "half an archive": ("t.jsonl.xz", lzma.compress(LINE.encode() * 99)[:-40], [], ["data.train", "t.jsonl.xz"]),
    "an unknown kind": ("t.bin", b"text", [], ["data.train.0: ", "t.bin is no text this can read", "it reads jsonl, json"]),
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
    refuse(place, ["run", "tiny.yaml"], ["could not be prepared from", "must have room", "DISTILL_CACHE"])


def test_a_disk_that_fills_while_text_is_prepared(place, tmp_path, monkeypatch, refuse):
    def full(*arguments, **keywords):
        raise OSError("4096 requested and 100 written")  # what numpy raises, without the system's number

    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(np, "save", full)
    refuse(place, ["run", "tiny.yaml"], ["could not be prepared from", "4096 requested", "must have room"])
    assert not list((tmp_path / "cache" / "prepared").iterdir()), "half a folder was left behind"


def test_the_python_api_says_the_same(place):
    with pytest.raises(UserError, match=r"data\.heldout\.0: no file matches 'gone'"):
        distill.run("tiny.yaml", overrides=["data.heldout.0.path=gone"], runs="runs")
