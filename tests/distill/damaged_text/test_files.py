"""Damaged, hostile or unsupported text files: one message with the file, the line and the fix."""

import copy
import json
import os

import pytest

from distill.errors import UserError
from distill.recipe import TextSource
from distill.text.preparation import prepare
from tests.distill.damaged_text.lines import BULK, LINE, PACK
from tests.distill.prepared_folders import documents

pytestmark = pytest.mark.usefixtures("own_cache")
DEEP = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
LINES = {
    "a number": ('{"text": 5}\n', "line 2: the column 'text' holds int, not text (5)"),
    "a list": ('{"text": ["a"]}\n', "line 2: the column 'text' holds list, not text (['a'])"),
    "an object": ('{"text": {"a": null}}\n', "line 2: the column 'text' holds dict"),
    "truth": ('{"text": true}\n', "line 2: the column 'text' holds bool"),
    "not a number": ('{"text": NaN}\n', "line 2: the column 'text' holds float, not text (nan)"),
    "a number without end": ('{"text": ' + "9" * 5000 + "}\n", "line 2: a number has more digits than can be read"),
    "deep": (DEEP, "line 2: it is nested too deep"),
    "no object": ('"river"\n', "line 2, is 'river', not an object"),
    "a list of objects": ('[{"text": "a"}]\n', "line 2, is [{'text': 'a'}], not an object"),
    "two objects": ('{"text": "a"} {"text": "b"}\n', "line 2: Extra data (column 15)"),
    "no UTF-8": (b'{"text": "\xff"}\n', "line 2, is not UTF-8 text: byte 10 is 0xff"),
    "UTF-16": (LINE.encode("utf-16"), "line 2, is not UTF-8 text: byte 0 is 0xff"),
    "half of a pair": ('{"text": "a \\ud800 b"}\n', "line 2: the column 'text' holds half of a surrogate pair ('\\ud800')"),
    "a source that is none": ('{"text": "a", "source": {"of": 1}}\n', "line 2: source is {'of': 1}, which is not a name"),
    "a raw tab": ('{"text": "a\tb"}\n', "line 2: Invalid control character"),
    "zeros": (b"\0" * 40 + b"\n", "line 2: Expecting value (column 1)"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line(refused, written, name):
    bad, part = LINES[name]
    bad = bad if isinstance(bad, bytes) else bad.encode()
    said = refused(path=written("t.jsonl", LINE.encode() + bad + LINE.encode()))
    assert "t.jsonl" in said and part in said, said


ARRAYS = {
    "cut off": ('[{"text": "a"},\n {"text": "b', "ends early, after line 2"),
    "without an end": ('[{"text": "a"},\n {"text": "b"}', "ends early, after line 2"),
    "an entry of another type": ('[{"text": "a"},\n\n 5]', "line 3, is 5, neither an object nor a text"),
    "no comma": ('[{"text": "a"}\n {"text": "b"}]', "an entry should be followed by , or ]"),
    "broken": ('[{"text": "a"},\n {"text" "b"}, {"text": "' + "c" * 99 + '"}]', "after line 2: Expecting ':' delimiter"),
    "deep": ("[" * 100_000, "nested too deep"),
    "empty": ("[]", "holds no entry"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_bad_array(refused, written, name):
    content, part = ARRAYS[name]
    said = refused(path=written("t.json", content))
    assert "t.json" in said and part in said, said


TABLES = {
    "more cells than columns": (
        "text,id\na,1\nb,2,3\n",
        "after line 3: the line has 3 cells, the first line names 2",
    ),
    "a quote that is never closed": ('text,id\n"a,1\nb,2\n', "after line 3: a quoted cell is never closed"),
    "another column": ("body,id\na,1\n", "there is no column 'text' in"),
    "a header alone": ("text,id\n", "holds no entry"),
    "no UTF-8": (b"text\nok\nna\xefve\n", "line 3, is not UTF-8 text: byte 2 is 0xef"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_bad_csv(refused, written, name):
    content, part = TABLES[name]
    assert part in refused(path=written("t.csv", content))


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.xz", "jsonl.zst", "jsonl.bz2", "txt.gz", "csv.xz", "json.zst"])
def test_a_packed_file_that_is_damaged(refused, written, kind):
    """Cut anywhere it is said to end early; of another packing than its name says, or altered, it is said to be so."""
    whole = PACK[kind.split(".")[1]](BULK)
    for kept in (len(whole) - 3, len(whole) // 2):
        said = refused(path=written(f"t.{kind}", whole[:kept]))
        assert f"t.{kind} ends early, " in said and "it is cut off; fetch it again" in said, said
    said = refused(path=written(f"t.{kind}", BULK))
    assert f"is not a .{kind.split('.')[1]} file: it begins with b'{{\"text" in said and "correct its ending" in said
    altered = bytearray(whole)
    altered[len(whole) // 2 : len(whole) // 2 + 40] = b"\xff\x00" * 20
    assert f"t.{kind}" in refused(path=written(f"t.{kind}", bytes(altered)))


def test_parquet_that_is_damaged(refused, tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"text": ["a river"] * 900, "id": list(range(900))}), path, compression="none")
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[: len(whole) // 2], b"PAR1" + b"\0" * 99):
        path.write_bytes(damaged)
        said = refused(path=str(path))
        assert "t.parquet" in said and ": ;" not in said, said
    for column, part in (
        ("id", "row 1: the column 'id' holds int, not text (0); there are text, id"),
        ("x", "no column 'x'"),
    ):
        path.write_bytes(whole)
        assert part in refused(path=str(path), column=column)
    (tmp_path / "u.parquet").write_bytes(b"")
    assert "u.parquet is empty" in refused(path=str(tmp_path / "u.parquet"))


@pytest.mark.parametrize("documents", ["file", "lines", "paragraphs"])
def test_text_that_is_no_text(refused, written, documents):
    said = refused(path=written("t.txt", b"one\n\ntwo\nthr\xc3\x28ee\n"), documents=documents)
    assert "t.txt, line 4, is not UTF-8 text: byte 3 is 0xc3" in said


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("t.jsonl", {}),
        ("t.json", {}),
        ("t.csv", {}),
        ("t.txt", {}),
        ("t.txt", {"documents": "lines"}),
        ("t.txt", {"documents": "paragraphs"}),
        ("t.parquet", {}),
        ("set/train.jsonl", {}),
    ],
)
def test_a_document_that_is_too_long(refused, tmp_path, name, source):
    """By the bytes of its UTF-8, of which an é has two."""
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "set").mkdir()
    text = "é" * 501
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / name)
    else:
        forms = {"jsonl": '{{"text": "{}"}}\n', "json": '[{{"text": "{}"}}]', "csv": "text\n{}\n", "txt": "{}"}
        (tmp_path / name).write_text(forms[name.split(".")[1]].format(text), encoding="utf-8")
    place = {"hub": str(tmp_path / "set")} if "/" in name else {"path": str(tmp_path / name)}
    said = refused(**place, **source, longest=1000)
    assert "is longer than 1,000 bytes" in said and "data.longest_document higher" in said


def test_files_that_are_none(refused, tmp_path, monkeypatch):
    (tmp_path / "folder.jsonl").mkdir()
    assert "folder.jsonl is a folder; name files in it" in refused(path=str(tmp_path / "folder.jsonl"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe.jsonl is a pipe or a device, not a plain file" in refused(path=str(tmp_path / "pipe.jsonl"))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone")
    assert "link.jsonl cannot be read: No such file" in refused(path=str(tmp_path / "link.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl is empty; remove it, or fetch it again" in refused(path=str(tmp_path / "*y.jsonl"))
    assert "hub is" in refused(hub=str(tmp_path / "empty.jsonl"))
    assert "cannot have a NUL" in refused(path="a\0b.jsonl") and "cannot have a NUL" in refused(hub="a\0b")
    assert "no file matches" in refused(path=f"{'x' * 5000}.jsonl")
    assert "leads out of the shipped text" in refused(path="shipped:../configs/*.json")
    assert "leads out of the shipped text" in refused(path=f"shipped:{tmp_path}/t.jsonl")


def test_names_are_shown_and_not_acted_on(refused, written):
    said = refused(path=written("a\x1b[31m\nb [bold].jsonl", "x"))
    assert "a\\x1b[31m\\nb [bold].jsonl could not be read: line 1" in said and "\x1b" not in said


def test_a_column_that_no_row_has(refused, written):
    rows = '{"body": "a", "title": "b"}\n{"body": "c", "url": "d"}\n'
    said = refused(path=written("t.jsonl", rows))
    assert "there is no column 'text' in" in said and said.endswith("there are body, title, url")


def test_rows_that_lack_the_text(tokenizer, written):
    """Are none, as those are whose text is null."""
    path = written("t.jsonl", LINE + '{"id": 1}\n{"text": null}\n\n{"text": ""}\n' + LINE)
    folder = prepare([TextSource(path=path)], tokenizer, separator=None, seed=0, limit=None, where="x")
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["documents"] == 2 and meta["labels"] == ["t"]


def test_text_that_looks_like_something_else(tokenizer, written):
    """Dates are text, and so is what begins with a mark of byte order or ends lines as other systems do."""
    rows = ["2024-01-01", "2024-01-02T10:00:00", "1e5", "null"]
    content = "\ufeff" + "\r\n".join(json.dumps({"text": text}) for text in rows)
    folder = prepare(
        [TextSource(path=written("t.jsonl", content))], tokenizer, separator=None, seed=0, limit=None, where="x"
    )
    pieces = documents(folder)
    assert sorted(tokenizer.decode(piece[:-1]) for piece in pieces) == sorted(rows)


def test_a_tokenizer_that_fails(tokenizer, written, monkeypatch):
    class Failing(type(tokenizer)):
        def __call__(self, texts, **options):
            if "bad" in str(texts):
                raise BaseException("called `Result::unwrap()` on an `Err` value")  # as its panics are, no Exception
            return super().__call__(texts, **options)

    failing = copy.copy(tokenizer)
    failing.__class__ = Failing
    path = written("t.jsonl", LINE * 3 + '{"text": "a bad text"}\n')
    with pytest.raises(UserError, match=r"tokenizer fails on the text that begins 'a bad text': called `Result"):
        prepare([TextSource(path=path)], failing, separator=None, seed=0, limit=None, where="x")
