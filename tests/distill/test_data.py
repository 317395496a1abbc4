"""From text to batches: no token is lost or mixed up, and window k is always the same."""

import gzip
import json
import lzma
import pickle

import numpy as np
import pytest
import torch

from distill.errors import UserError
from distill.recipe import TextSource
from distill.text.preparation import prepare
from distill.text.windows import Windows
from tests.distill.prepared_folders import write

pytestmark = pytest.mark.usefixtures("own_cache")


def prepared(tokenizer, *sources, separator=None, seed=0, limit=None):
    return prepare(sources, tokenizer, separator=separator, seed=seed, limit=limit, where="data.train")


def texts_of(folder, tokenizer):
    tokens, starts = np.load(folder / "00000" / "tokens.npy"), np.load(folder / "00000" / "starts.npy")
    pieces = np.split(tokens, starts[1:])
    assert all(piece[-1] == tokenizer.eos_token_id for piece in pieces)
    return sorted(tokenizer.decode(piece[:-1]) for piece in pieces)


def test_every_text_arrives_whole(tokenizer, text_files):
    path = text_files / "train.jsonl"
    folder = prepared(tokenizer, TextSource(path=str(path)))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert texts_of(folder, tokenizer) == sorted(row["text"] for row in rows)
    meta = json.loads((folder / "meta.json").read_text())
    assert set(meta["labels"]) == {row["source"] for row in rows}
    assert prepared(tokenizer, TextSource(path=str(path))) == folder


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
        whole = "".join(row["text"] + "\n" for row in rows)
        content = {"txt": whole, "csv": "text\n" + whole}
        data = content.get(suffix, lines).encode()
        path.write_bytes({"jsonl.xz": lzma.compress, "jsonl.gz": gzip.compress}.get(suffix, bytes)(data))
    folder = prepared(tokenizer, TextSource(path=str(path)))
    right = [whole] if suffix == "txt" else sorted(row["text"] for row in rows)
    assert texts_of(folder, tokenizer) == right
    assert json.loads((folder / "meta.json").read_text())["labels"] == ["some"]


def test_each_file_of_a_glob_is_a_source(tokenizer, tmp_path):
    for name in ("wiki-00", "wiki-01", "books-00"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": 1, "text": f"from {name}"}))
    folder = prepared(tokenizer, TextSource(path=str(tmp_path / "*.jsonl")))
    meta = json.loads((folder / "meta.json").read_text())
    labels = sorted(meta["labels"][index] for index in np.load(folder / "00000" / "labels.npy"))
    assert labels == ["books", "wiki", "wiki"]


def test_order_is_the_seeds(tokenizer, text_files):
    tokens = [
        np.load(prepared(tokenizer, TextSource(path=str(text_files / "train.jsonl")), seed=s) / "00000" / "tokens.npy")
        for s in (0, 1)
    ]
    assert len(tokens[0]) == len(tokens[1]) and not np.array_equal(*tokens)


def test_limit_and_weights(tokenizer, tmp_path):
    for name in ("few", "many"):
        lines = [json.dumps({"text": f"{name} words here, number {index}"}) for index in range(400)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [
        TextSource(path=str(tmp_path / "few.jsonl"), weight=1.0),
        TextSource(path=str(tmp_path / "many.jsonl"), weight=3.0),
    ]
    folder = prepared(tokenizer, *sources, limit=4000)
    meta = json.loads((folder / "meta.json").read_text())
    labels = [meta["labels"][index] for index in np.load(folder / "00000" / "labels.npy")]
    assert 4000 <= meta["tokens"] < 4100
    assert 0.6 < labels.count("many") / len(labels) < 0.88


def write_dataset(folder, shards=40, rows=150):
    """A data set of parquet shards, whose texts say which shard they are from."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    for shard in range(shards):
        table = {"body": [f"shard {shard} row {row}" for row in range(rows)], "id": list(range(rows))}
        parquet.write_table(pyarrow.table(table), folder / f"train-{shard:05}-of-{shards:05}.parquet")
    return folder


def test_a_data_set_by_name_is_streamed(tokenizer, tmp_path):
    """The code of a data set on the hub, which `datasets` also runs for a folder: of forty shards a few are opened."""
    folder = write_dataset(tmp_path / "named-set")
    source = TextSource(hub=str(folder), column="body", label="named")
    few, more = (prepared(tokenizer, source, limit=limit) for limit in (1000, 2000))
    found = {text.split()[1] for text in texts_of(few, tokenizer)}
    assert len(found) <= 12  # datasets shuffles ten shards at a time
    tokens = [np.load(folder / "00000" / "tokens.npy") for folder in (few, more)]
    assert 1000 <= len(tokens[0]) < 1100 and np.array_equal(tokens[0], tokens[1][: len(tokens[0])])
    assert json.loads((few / "meta.json").read_text())["labels"] == ["named"]
    assert prepared(tokenizer, source, limit=1000) == few
    assert prepared(tokenizer, source, limit=1000, seed=1) != few


def test_a_run_takes_of_a_named_set_what_it_trains_on(tiny_recipe, tiny_teacher, tokenizer, tmp_path):
    from distill.recipe_file import check
    from distill.runs.texts import text_windows

    folder = write_dataset(tmp_path / "named-set")
    tiny_recipe["data"]["train"] = [{"hub": str(folder), "column": "body"}]
    windows = text_windows(check(tiny_recipe, "here"), tokenizer, "train")
    budget = 256 + 512 + 768 + 768 + 4 * 4 * 32  # four stages, each with a batch to spare
    assert budget <= windows.meta.tokens < budget + 100


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"hub": "{set}"}, r"data\.train\.0: there is no column 'text'; there are body, id"),
        (
            {"hub": "{set}", "column": "id"},
            r"data\.train\.0: .*named-set, row 1: the column 'id' holds int, not text \(0\); there are body, id",
        ),
        ({"hub": "{set}", "column": "body", "split": "test"}, "Bad split: test|Unknown split .test."),
        ({"hub": "{set}", "column": "body", "name": "other"}, "'other' not found"),
        (
            {"path": "{set}/*00000*.parquet", "column": "id"},
            r"parquet, row 1: the column 'id' holds int, not text \(0\); there are body, id",
        ),
    ],
)
def test_what_a_data_set_does_not_have(tokenizer, tmp_path, source, message):
    folder = write_dataset(tmp_path / "named-set", 1, 3)
    source = {key: value.format(set=folder) for key, value in source.items()}
    with pytest.raises(UserError, match=message):
        prepared(tokenizer, TextSource(**source))
    assert not list((tmp_path / "cache").rglob("tokens.npy"))


@pytest.fixture
def mixture(tmp_path):
    """Sources of short and long texts with weights 3 and 1, and labels `short` and `long`."""
    for name, repeat, rows in (("short", 1, 300), ("long", 12, 20)):
        lines = [json.dumps({"text": f"{name} words here, number {row}. " * repeat}) for row in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return [
        TextSource(path=str(tmp_path / f"{name}.jsonl"), weight=weight) for name, weight in (("short", 3.0), ("long", 1.0))
    ]


def test_weights_are_shares_of_tokens(tokenizer, mixture):
    folder = prepared(tokenizer, *mixture, limit=6000)
    meta, labels = json.loads((folder / "meta.json").read_text()), np.load(folder / "00000" / "labels.npy")
    lengths = np.diff(np.append(np.load(folder / "00000" / "starts.npy"), meta["tokens"]))
    short = lengths[labels == meta["labels"].index("short")].sum() / meta["tokens"]
    assert abs(short - 0.75) < 0.05  # as near as a document allows
    tokens = np.load(folder / "00000" / "tokens.npy")
    fewer = np.load(prepared(tokenizer, *mixture, limit=3000) / "00000" / "tokens.npy")
    assert np.array_equal(fewer, tokens[: len(fewer)])  # the same text whenever it is made, however much of it


def test_a_small_source_comes_again_in_another_order(tokenizer, mixture):
    folder = prepared(tokenizer, *mixture)
    texts = texts_of(folder, tokenizer)
    short = [text for text in texts if text.startswith("short")]
    assert len(set(short)) == 300 and len(set(texts)) == 320  # each text at least once
    assert len(short) > 600  # three tokens in four are theirs, so that they come several times
    tokens, starts = np.load(folder / "00000" / "tokens.npy"), np.load(folder / "00000" / "starts.npy")
    pieces = [tokenizer.decode(piece[:-1]) for piece in np.split(tokens, starts[1:])]
    order = [text for text in pieces if text.startswith("short")]
    assert order[:300] != order[300:600] and set(order[:300]) == set(order[300:600])


def test_a_weighted_source_without_text(tokenizer, mixture, tmp_path):
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"data\.train\.2: there is no text in this source"):
        prepared(tokenizer, *mixture, TextSource(path=str(tmp_path / "none.jsonl")))


def test_preparing_says_nothing_of_its_libraries(tokenizer, mixture, capfd, caplog):
    from distill.text.data_sets import label_and_row

    tokenizer.model_max_length, usual = 8, tokenizer.model_max_length
    try:
        prepared(tokenizer, *mixture)
    finally:
        tokenizer.model_max_length = usual
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    out, err = capfd.readouterr()
    assert out + err == ""
    assert pickle.loads(pickle.dumps(label_and_row)) is label_and_row  # what datasets hashes it by


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "nowhere/*.jsonl"}, r"data\.train\.0: no file matches 'nowhere/\*\.jsonl'"),
        ({"path": "{here}/rows.jsonl", "column": "txt"}, r"there is no column 'txt' in .*rows\.jsonl; there are text"),
        ({"path": "{here}/picture.png"}, "is not a file of text"),
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
        prepared(tokenizer, TextSource(**source))
    assert not list((tmp_path / "cache").rglob("tokens.npy"))


def test_a_separator_that_is_no_token(tokenizer, text_files):
    with pytest.raises(UserError, match="no token '<nothing>'"):
        prepared(tokenizer, TextSource(path=str(text_files / "train.jsonl")), separator="<nothing>")


@pytest.fixture
def windows(tmp_path):
    """Documents of 5, 3, 12 and 9 tokens, numbered 100, 101 ... so that places can be read off the tokens."""
    lengths = [5, 3, 12, 9]
    tokens = np.arange(100, 100 + sum(lengths)).astype(np.uint16)
    write(tmp_path, tokens, np.cumsum([0, *lengths[:-1]]), np.asarray([0, 1, 0, 1]), ["a", "b"])
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


def test_long_documents_in_order(tmp_path):
    lengths = [30, 3, 3, 4, 25, 7, 40, 5, 6, 2, 80, 3, 9]
    total = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    write(tmp_path, np.arange(total).astype(np.uint16), starts, np.zeros(len(lengths)), ["a"])
    orders = set()
    for seed in range(5):
        windows = Windows(tmp_path, 8, seed, in_order=True)
        for epoch in range(2):
            first = windows.batch(epoch * windows.count, windows.count).ids[:, 0]
            assert sorted(first.tolist()) == list(range(0, total - 8, 8))
            orders.add(tuple(first.tolist()))
            for start, length in zip(starts, lengths, strict=True):
                if length > 8:  # every window that continues the document comes right after the one that it continues
                    inside = [int(place) for place in first if start < place < start + length]
                    assert inside == sorted(inside)
                    at = [first.tolist().index(place) for place in inside]
                    assert at == list(range(at[0], at[0] + len(at))) if at else length < 16
                    assert not at or first.tolist()[at[0] - 1] == inside[0] - 8
    assert len(orders) > 5


def test_a_position_is_a_number(windows):
    whole = windows(5).batch(0, 9).ids
    pieces = torch.cat([windows(5).batch(start, count).ids for start, count in ((0, 2), (2, 5), (7, 2))])
    assert torch.equal(whole, pieces)


def test_too_little_text(tmp_path):
    write(tmp_path, np.zeros(5, np.uint16), np.zeros(1), np.zeros(1), ["a"])
    with pytest.raises(UserError, match=r"data\.seq_len is 8, but there are only 5 tokens"):
        Windows(tmp_path, 8, 0)
