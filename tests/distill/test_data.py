"""From text to batches: nothing lost, nothing mixed up, every window where its number says."""

import gzip
import json
import lzma

import numpy as np
import pytest
import torch

from distill.data import Windows
from distill.errors import UserError
from distill.prepare import prepare
from distill.recipe import Text


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))


def prepared(tokenizer, *sources, separator=None, seed=0, limit=None):
    return prepare(sources, tokenizer, separator=separator, seed=seed, limit=limit, where="data.train")


def texts_of(folder, tokenizer):
    tokens, starts = np.load(folder / "tokens.npy"), np.load(folder / "starts.npy")
    pieces = np.split(tokens, starts[1:])
    assert all(piece[-1] == tokenizer.eos_token_id for piece in pieces)
    return sorted(tokenizer.decode(piece[:-1]) for piece in pieces)


def test_every_text_arrives_whole(tokenizer, text_files):
    path = text_files / "train.jsonl"
    folder = prepared(tokenizer, Text(path=str(path)))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert texts_of(folder, tokenizer) == sorted(row["text"] for row in rows)
    meta = json.loads((folder / "meta.json").read_text())
    assert set(meta["labels"]) == {row["source"] for row in rows}
    assert prepared(tokenizer, Text(path=str(path))) == folder


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.xz", "jsonl.gz", "jsonl.zst", "json", "parquet", "txt", "csv"])
def test_formats(tokenizer, tmp_path, suffix):
    rows = [{"text": f"document number {index}"} for index in range(5)]
    path, lines = tmp_path / f"some.{suffix}", "\n".join(json.dumps(row) for row in rows)
    if suffix == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "jsonl.zst":
        import zstandard

        path.write_bytes(zstandard.compress(lines.encode()))
    else:
        content = {"txt": "\n".join(row["text"] for row in rows), "csv": "text\n" + "\n".join(row["text"] for row in rows)}
        data = content.get(suffix, lines).encode()
        path.write_bytes({"jsonl.xz": lzma.compress, "jsonl.gz": gzip.compress}.get(suffix, bytes)(data))
    folder = prepared(tokenizer, Text(path=str(path)))
    assert texts_of(folder, tokenizer) == sorted(row["text"] for row in rows)
    assert json.loads((folder / "meta.json").read_text())["labels"] == ["some"]


def test_each_file_of_a_glob_is_a_source(tokenizer, tmp_path):
    for name in ("wiki-00", "wiki-01", "books-00"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": 1, "text": f"from {name}"}))
    folder = prepared(tokenizer, Text(path=str(tmp_path / "*.jsonl")))
    meta = json.loads((folder / "meta.json").read_text())
    labels = sorted(meta["labels"][index] for index in np.load(folder / "labels.npy"))
    assert labels == ["books", "wiki", "wiki"]


def test_order_is_the_seeds(tokenizer, text_files):
    tokens = [
        np.load(prepared(tokenizer, Text(path=str(text_files / "train.jsonl")), seed=s) / "tokens.npy") for s in (0, 1)
    ]
    assert len(tokens[0]) == len(tokens[1]) and not np.array_equal(*tokens)


def test_limit_and_weights(tokenizer, tmp_path):
    for name in ("few", "many"):
        lines = [json.dumps({"text": f"{name} words here, number {index}"}) for index in range(400)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [Text(path=str(tmp_path / "few.jsonl"), weight=1.0), Text(path=str(tmp_path / "many.jsonl"), weight=3.0)]
    folder = prepared(tokenizer, *sources, limit=4000)
    meta = json.loads((folder / "meta.json").read_text())
    labels = [meta["labels"][index] for index in np.load(folder / "labels.npy")]
    assert 4000 <= meta["tokens"] < 4100
    assert 0.6 < labels.count("many") / len(labels) < 0.88


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "nowhere/*.jsonl"}, r"data\.train\.0: no file matches 'nowhere/\*\.jsonl'"),
        ({"path": "{here}/rows.jsonl", "column": "txt"}, "there is no column 'txt'; there are text"),
        ({"path": "{here}/picture.png"}, "is no text this can read"),
        ({"path": "{here}/broken.jsonl"}, "could not be read"),
        ({"path": "{here}/blank.jsonl"}, "there is no text"),
        ({"hub": "org/none"}, "org/none could not be read"),
    ],
)
def test_text_that_cannot_be_read(tokenizer, tmp_path, source, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "broken.jsonl").write_text('{"text": "x"\n')
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    source = {key: value.format(here=tmp_path) for key, value in source.items()}
    with pytest.raises(UserError, match=message):
        prepared(tokenizer, Text(**source))
    assert not list((tmp_path / "cache").rglob("tokens.npy"))


def test_a_separator_that_is_no_token(tokenizer, text_files):
    with pytest.raises(UserError, match="no token '<nothing>'"):
        prepared(tokenizer, Text(path=str(text_files / "train.jsonl")), separator="<nothing>")


@pytest.fixture
def windows(tmp_path):
    """Documents of 5, 3, 12 and 9 tokens, numbered 100, 101 ... so that places can be read off the tokens."""
    lengths = [5, 3, 12, 9]
    np.save(tmp_path / "tokens.npy", np.arange(100, 100 + sum(lengths)).astype(np.uint16))
    np.save(tmp_path / "starts.npy", np.cumsum([0, *lengths[:-1]]))
    np.save(tmp_path / "labels.npy", np.asarray([0, 1, 0, 1], np.int16))
    (tmp_path / "meta.json").write_text(json.dumps({"labels": ["a", "b"], "sha256": ""}))
    return lambda seed: Windows(tmp_path, 7, seed)


def test_windows(windows):
    batch = windows(None).batch(0, 4)
    assert torch.equal(batch.ids, torch.arange(100, 128).view(4, 7))
    assert torch.equal(batch.targets, batch.ids + 1)
    assert batch.documents.tolist() == [[0] * 5 + [1] * 2, [0] + [1] * 6, [0] * 6 + [1], [0] * 7]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 0], list(range(7))]
    assert batch.weights.tolist() == [[1, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 1], [1] * 7]
    assert batch.labels[0].tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_epochs_see_everything_once_in_another_order(windows):
    first, second = (windows(3).batch(start, 4).ids for start in (0, 4))
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist()) == [100, 107, 114, 121]
    orders = {tuple(windows(seed).batch(0, 4).ids[:, 0].tolist()) for seed in range(8)}
    assert len(orders) > 3


def test_a_position_is_a_number(windows):
    whole = windows(5).batch(0, 9).ids
    pieces = torch.cat([windows(5).batch(start, count).ids for start, count in ((0, 2), (2, 5), (7, 2))])
    assert torch.equal(whole, pieces)


def test_too_little_text(tmp_path):
    for name, array in (("tokens", np.zeros(5, np.uint16)), ("starts", np.zeros(1)), ("labels", np.zeros(1, np.int16))):
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(UserError, match=r"data\.seq_len is 8, but there are only 5 tokens"):
        Windows(tmp_path, 8, 0)
