"""Files as documents: the content of each kind, names that look like patterns, and a cache that notices changed files."""

import gzip
import hashlib
import json
import os

import numpy as np
import pytest

from distill.errors import UserError
from distill.recipe import TextSource
from distill.recipe_file import check
from distill.runs.texts import text_windows
from distill.text import preparation
from distill.text.preparation import prepare
from distill.text.windows import Windows

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def prepared(tokenizer):
    """Prepares sources, each a path or entries."""

    def prepared(*sources, seed=0, separator=None):
        given = [TextSource(**(source if isinstance(source, dict) else {"path": str(source)})) for source in sources]
        return prepare(given, tokenizer, separator=separator, seed=seed, limit=None, where="data.train")

    return prepared


@pytest.fixture
def texts_of(prepared, tokenizer):
    """The documents of sources as (label, text), sorted."""

    def texts_of(*sources, **further):
        folder = prepared(*sources, **further)
        pieces = np.split(np.load(folder / "00000" / "tokens.npy"), np.load(folder / "00000" / "starts.npy")[1:])
        names = json.loads((folder / "meta.json").read_text())["labels"]
        labels = [names[index] for index in np.load(folder / "00000" / "labels.npy")]
        return sorted((label, tokenizer.decode(piece[:-1])) for label, piece in zip(labels, pieces, strict=True))

    return texts_of


POEM = "first line\nsecond line\n\n \t\nthird line\r\n\r\nfourth\n"


@pytest.mark.parametrize(
    ("documents", "right"),
    [
        (None, ["first line\nsecond line\n\n \t\nthird line\n\nfourth\n"]),
        ("file", ["first line\nsecond line\n\n \t\nthird line\n\nfourth\n"]),
        ("paragraphs", ["first line\nsecond line", "fourth", "third line"]),
        ("lines", ["first line", "fourth", "second line", "third line"]),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
def test_documents_of_a_txt_file(texts_of, tmp_path, documents, right, suffix):
    (tmp_path / f"poem.{suffix}").write_bytes((gzip.compress if "gz" in suffix else bytes)(POEM.encode()))
    source = {"path": str(tmp_path / f"poem.{suffix}"), "documents": documents}
    assert texts_of(source) == [("poem", text) for text in right]


def test_documents_of_what_is_no_txt_file(prepared, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(
        UserError, match=r"data\.train\.0: documents is 'lines', which is for \.txt files, but .*rows\.jsonl"
    ):
        prepared({"path": str(tmp_path / "rows.jsonl"), "documents": "lines"})


def test_cells_of_csv_are_what_is_written(texts_of, tmp_path):
    cells = ["NA", "null", "nan", "None", "007", "1.50", "TRUE", "hello"]
    (tmp_path / "cells.csv").write_text("text,source\n" + "".join(f"{cell},NA\n" for cell in cells) + ",empty\n")
    assert texts_of(tmp_path / "cells.csv") == sorted(("NA", cell) for cell in cells)


def test_numbers_alone_in_a_csv_are_text(texts_of, tmp_path):
    (tmp_path / "numbers.csv").write_text("id,text\n1,12\n2,007\n3,1e5\n")
    assert [text for _, text in texts_of(tmp_path / "numbers.csv")] == ["007", "12", "1e5"]


def test_a_data_set_folder_of_csv(texts_of, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("text\nNA\nnull\n12\n")
    assert [text for _, text in texts_of({"hub": str(tmp_path / "set")})] == ["12", "NA", "null"]


@pytest.mark.parametrize("odd", ["part[1]", "a*b", "what?", "a::b", "{x}", "#1 of [2]", "a.b::c[", ".hidden"])
def test_names_that_look_like_patterns(texts_of, tmp_path, odd):
    for name, text in ((odd, "the odd one"), ("part1", "another"), ("aab", "a third")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"source": "s", "text": text}))
    assert texts_of(tmp_path / f"{odd}.jsonl") == [("s", "the odd one")]
    shown = ["a third", "another"] + ["the odd one"] * (odd[0] != ".")
    assert [text for _, text in texts_of(tmp_path / "*.jsonl")] == shown


def test_folders_that_look_like_patterns(texts_of, tmp_path, monkeypatch):
    folder = tmp_path / "run [1]" / "set*"
    folder.mkdir(parents=True)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "run [1]" / "cache"))
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    right = [("a", "a"), ("b", "b")]
    assert texts_of(folder / "*.jsonl") == right
    monkeypatch.chdir(tmp_path)
    assert texts_of("run [1]/set*/[ab].jsonl") == right


def test_a_data_set_folder_that_looks_like_a_pattern(texts_of, tmp_path):
    (tmp_path / "set[1]").mkdir()
    (tmp_path / "set[1]" / "train.jsonl").write_text(json.dumps({"text": "a"}))
    assert texts_of({"hub": str(tmp_path / "set[1]"), "label": "x"}) == [("x", "a")]


def test_a_data_set_folder_of_txt(texts_of, prepared, tmp_path):
    for name, content in (("txt", POEM), ("jsonl", '{"text": "x"}')):
        (tmp_path / f"{name} set").mkdir()
        (tmp_path / f"{name} set" / f"train.{name}").write_text(content)
    for documents, count in ((None, 1), ("paragraphs", 3), ("lines", 4)):
        source = {"hub": str(tmp_path / "txt set"), "label": "x", "documents": documents}
        assert len(texts_of(source)) == count
    with pytest.raises(UserError, match=r"documents is 'lines', which is for \.txt files, but .*jsonl set has none"):
        prepared({"hub": str(tmp_path / "jsonl set"), "documents": "lines"})


def test_messages_name_the_file_itself(prepared, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "x"\n')
    with pytest.raises(UserError, match=r"broken\.jsonl could not be read") as caught:
        prepared(tmp_path / "broken.jsonl")
    assert "reading" not in str(caught.value)


def test_the_cache_knows_how_files_are_read(prepared, texts_of, tmp_path):
    line = json.dumps({"text": "one"}) + "\n"
    for name in ("a.jsonl", "a.txt", "b.jsonl", "elsewhere/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(line)
    assert texts_of(tmp_path / "a.jsonl") == [("a", "one")]
    assert texts_of(tmp_path / "a.txt") == [("a", line)]
    assert texts_of({"path": str(tmp_path / "a.txt"), "documents": "lines"}) == [("a", line.strip())]
    assert texts_of(tmp_path / "b.jsonl") == [("b", "one")]
    assert texts_of({"path": str(tmp_path / "b.jsonl"), "label": "c"}) == [("c", "one")]
    both = {"path": str(tmp_path / "[ab].jsonl")}
    assert texts_of(both) == [("a", "one"), ("b", "one")]
    apart = prepared(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert apart != prepared(both)
    assert prepared(tmp_path / "elsewhere" / "a.jsonl") == prepared(tmp_path / "a.jsonl")


def test_a_file_edited_in_place(texts_of, tmp_path):
    """With the same name, size and time as before."""
    for kind, form in (
        ("jsonl", '{{"text": "{}"}}\n'),
        ("txt", "{}"),
        ("csv", "text\n{}\n"),
        ("jsonl.gz", '{{"text": "{}"}}\n'),
    ):
        path, pack = tmp_path / f"x.{kind}", gzip.compress if kind.endswith("gz") else bytes
        for word in ("old words", "new words"):
            path.write_bytes(pack(form.format(word).encode()))
            os.utime(path, ns=(10**18, 10**18))
            for seed in (0, 1):
                assert texts_of(path, seed=seed) == [("x", word)], kind


def test_a_file_that_changes_while_it_is_read(prepared, tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "before"}\n')
    write = preparation._write

    def changing(*arguments):
        write(*arguments)
        path.write_text('{"text": "after, and longer"}\n')

    monkeypatch.setattr(preparation, "_write", changing)
    with pytest.raises(UserError, match=r"data\.train: its files changed while they were read"):
        prepared(path)
    assert not list((tmp_path / "cache").rglob("tokens.npy"))


@pytest.mark.parametrize("name", ["tokens.npy", "starts.npy", "labels.npy", "hashes.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["altered", "cut", "gone"])
def test_a_damaged_prepared_folder(prepared, text_files, name, damage):
    folder = prepared(text_files / "train.jsonl")
    Windows(folder, 8, 0)
    content = bytearray((folder / "00000" / name).read_bytes())
    content[-3] ^= 1
    if damage == "gone":
        (folder / "00000" / name).unlink()
    else:
        (folder / "00000" / name).write_bytes(content if damage == "altered" else content[:-40])
    with pytest.raises(UserError, match=rf"{folder.name}.*delete .*{folder.name}, and the same command makes it again"):
        Windows(folder, 8, 0)


def rewritten(folder, name, array):
    """Another array in a prepared folder, whose shard says that it is the one that was written."""
    shard = folder / "00000"
    with (shard / f"{name}.npy").open("wb") as file:
        file.write(array) if isinstance(array, bytes) else np.save(file, array)
    meta = json.loads((shard / "meta.json").read_text())
    meta["files"][f"{name}.npy"] = hashlib.sha256((shard / f"{name}.npy").read_bytes()).hexdigest()
    (shard / "meta.json").write_text(json.dumps(meta))


HEADER = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<u2', 'fortran_order': False, 'shape': (1152921504606846976,), }"
ODD = {
    "floats": lambda found: found.astype(np.float32),
    "a scalar": lambda found: np.asarray(found[0]),
    "two dimensions": lambda found: found[None],
    "fewer": lambda found: found[:-1],
    "none": lambda found: found[:0],
    "texts": lambda found: found.astype("U4"),
    "objects": lambda found: found.astype(object),
    "records": lambda found: found.view([("x", found.dtype)]),
    "an absurd size": lambda found: HEADER.ljust(127) + b"\n" + b"\0" * 64,
    "an archive": lambda found: b"PK\x03\x04" + b"\0" * 99,
    "nothing": lambda found: b"",
}


@pytest.mark.parametrize("name", ["tokens", "starts", "labels", "hashes"])
@pytest.mark.parametrize("odd", ODD)
def test_a_prepared_folder_of_another_form(prepared, text_files, name, odd):
    """Though its hashes are right: somebody wrote it so."""
    folder = prepared(text_files / "train.jsonl")
    rewritten(folder, name, ODD[odd](np.load(folder / "00000" / f"{name}.npy")))
    with pytest.raises(
        UserError, match=rf"the prepared text in .*{folder.name}/00000 is damaged \(.+\); delete .*{folder.name}"
    ):
        Windows(folder, 8, 0)


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        ("starts", 0, 3, "starts.npy does not say where documents begin"),
        ("starts", 3, 0, "starts.npy does not say where documents begin"),
        ("starts", -1, 10**12, "starts.npy does not say where documents begin"),
        ("labels", 2, -1, "labels.npy goes beyond the 3 names"),
        ("labels", 2, 3, "labels.npy goes beyond the 3 names"),
    ],
)
def test_numbers_out_of_range_in_a_prepared_folder(prepared, text_files, name, place, value, said):
    folder = prepared(text_files / "train.jsonl")
    found = np.load(folder / "00000" / f"{name}.npy")
    found[place] = value
    rewritten(folder, name, found)
    with pytest.raises(UserError, match=said):
        Windows(folder, 8, 0)


def test_tokens_beyond_the_vocabulary(tiny_recipe, tokenizer):
    recipe = check(tiny_recipe, "here")
    folder = text_windows(recipe, tokenizer, "train").folder
    tokens = np.load(folder / "00000" / "tokens.npy")
    tokens[5] = len(tokenizer)
    rewritten(folder, "tokens", tokens)
    with pytest.raises(
        UserError,
        match=rf"{folder.name}/00000 is damaged .tokens.npy has a token 320, and the highest written was \d+.; delete",
    ):
        text_windows(recipe, tokenizer, "train")


def test_the_longest_document_is_a_setting(tiny_recipe, tokenizer):
    usual = check(tiny_recipe, "here")
    tiny_recipe["data"]["longest_document"] = "1k"
    recipe = check(tiny_recipe, "here")
    assert (usual.data.longest_document, recipe.data.longest_document) == (128_000_000, 1000)
    assert usual.fingerprint != recipe.fingerprint
    with pytest.raises(UserError, match=r"train\.jsonl, line \d+, is longer than 1,000 bytes"):
        text_windows(recipe, tokenizer, "train")


def test_more_labels_than_a_short_number_holds(prepared, tmp_path, monkeypatch):
    names = [f"source {index}" for index in range(70_000)]
    monkeypatch.setattr(preparation, "drawn", lambda *given: ((name, np.array([5, 6, 0])) for name in names))
    (tmp_path / "x.jsonl").write_text('{"text": "x"}\n')
    windows = Windows(prepared(tmp_path / "x.jsonl"), 210_000 - 1, None)
    labels = windows.batch(0, 1).labels[0]
    assert windows.label_names == names and labels.min() == 0
    assert [int(labels[place]) for place in (0, 3, 98_304, 209_996)] == [0, 1, 32_768, 69_998]
