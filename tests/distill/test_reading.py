"""Files that are read back: size limits, one message for each fault, and correct values of sound files."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
from pydantic import TypeAdapter

from distill import disk, reading
from distill.disk import append_line, check_writable, new_file, new_folder, sweep, write_text
from distill.errors import UserError, nearest, printable, reason_of
from distill.reading import read_arrays, read_json, read_lines, read_text
from distill.runs.records import STEP, Facts
from distill.yaml_file import dump, override, read

FACTS = TypeAdapter(Facts)

# what a run.json holds, and what is said of it
DAMAGED = {
    "empty": (b"", "it is empty"),
    "blank": (b" \n\t", "it is empty"),
    "cut short": (b'{"teacher": "ab', "it ends early, line 1 column"),
    "cut before a value": (b'{"teacher": ', "it ends early, line 1 column"),
    "no JSON": (b"{teacher}", "Expecting property name enclosed in double quotes, line 1 column 2"),
    "two documents": (b"{} {}", "Extra data, line 1 column 4"),
    "a list": (b"[1, 2]", "it is [1, 2]: it should be a valid mapping or instance"),
    "null": (b"null", "it is None"),
    "a wrong type": (b'{"teacher": 5}', "teacher is 5: it should be a valid string"),
    "a guessed type": (b'{"finished": 1}', "finished is 1: it should be a valid boolean"),
    "a wrong type inside": (b'{"versions": {"torch": 2}}', "versions.torch is 2: it should be a valid string"),
    "a key twice": (b'{"teacher": "a", "teacher": "b"}', "the key 'teacher' is given twice"),
    "nan": (b'{"x": NaN}', "NaN is not a finite number"),
    "infinity": (b'{"x": [-Infinity]}', "-Infinity is not a finite number"),
    "a number too large": (b'{"x": 1e999}', "the number '1e999' is too large"),
    "a long number": (b'{"format": ' + b"9" * 5000 + b"}", "has more than 18 digits"),
    "nested deep": (b'{"x": ' + b"[" * 70 + b"]" * 70 + b"}", "it is nested deeper than 64"),
    "nested without end": (b"[" * 200_000, "it is nested deeper than 64"),
    "half a character": (b'{"teacher": "\\ud800"}', "holds half a character"),
    "no UTF-8": (b'{"teacher": "\xff"}', "byte 13 is not UTF-8"),
    "UTF-16": ('{"teacher": "a"}'.encode("utf-16"), "byte 0 is not UTF-8"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_json(tmp_path, name):
    content, said = DAMAGED[name]
    file = tmp_path / "run.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_json(file, FACTS, fix="delete it")
    message = str(refused.value)
    assert message.startswith(f"{file} is damaged (") and message.endswith("; delete it") and said in message, message
    assert "\n" not in message and len(message) < 300


def test_json_is_given_as_it_is_written(tmp_path):
    content = {"teacher": "\u00e4\U0001f600", "finished": False, "later": [1, 2.5, None, {"a": "b"}]}
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert read_json(tmp_path / "run.json", FACTS, fix="") == content


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening one for reading would wait for a writer
    (tmp_path / "large").write_bytes(b"x" * 101)
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 2**40)
    for name, said in (
        ("pipe", "is not a plain file; mend it"),
        (".", "is a folder; mend it"),
        ("large", "is 101 bytes, and at most 100 bytes are read; mend it"),
        ("sparse", "is 1024 GiB, and at most 100 bytes"),
        ("gone", "cannot be read: No such file or directory; mend it"),
        ("x" * 300, "cannot be read: File name too long; mend it"),
        ("a\0b", "cannot be read: no file can have that name; mend it"),
    ):
        with pytest.raises(UserError, match=said):
            read_text(tmp_path / name, most=100, fix="mend it")
    assert len(read_text(tmp_path / "large", most=101, fix="")) == 101


STEPS = [{"stage_index": 1, "stage": "align", "step": step, "loss": 0.5} for step in (1, 2)]


@pytest.mark.parametrize("cut", ["", "\n", '{"stage_ind', '{"stage_index": 1}', "\n\n"])
def test_lines_whose_last_was_cut_short(tmp_path, cut):
    text = "".join(json.dumps(line) + "\n" for line in STEPS)
    (tmp_path / "m.jsonl").write_text(text[: -len(cut)] if cut == "\n" else text + cut.rstrip("\n"))
    assert read_lines(tmp_path / "m.jsonl", STEP, fix="") == STEPS


@pytest.mark.parametrize("line", ["{", "", "[]", '{"stage_index": 1, "stage": "a", "step": -1, "loss": 1}', '{"loss": NaN}'])
def test_a_damaged_line_is_named(tmp_path, line):
    lines = [json.dumps(STEPS[0]), line, json.dumps(STEPS[1])]
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"m\.jsonl is damaged \(line 2: .+\); take it out"):
        read_lines(tmp_path / "m.jsonl", STEP, fix="take it out")


# arrays


def archive(**members) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return packed.getvalue()


def array_file(shape: str = "(2, 2)", kind: str = "<f4", data: bytes = b"\0" * 16) -> bytes:
    header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


LONG = b"\0" * (70 * 2**20)  # 70 KB once it is packed
ARCHIVES = {
    "empty": (b"", "it is empty"),
    "no archive": (b"PK\x03\x04" + b"\0" * 60, "File is not a zip file"),
    "objects": (archive(a=array_file(kind="|O")), r"a\.npy holds object, not numbers"),
    "text": (archive(a=array_file(kind="<U4")), r"a\.npy holds <U4, not numbers"),
    "a shape beyond memory": (archive(a=array_file("(1099511627776, 1099511627776)")), "more than 64 MiB in all"),
    "a negative shape": (archive(a=array_file("(-1, 4)")), "not 2 dimensions"),
    "three dimensions": (archive(a=array_file("(1, 2, 2)")), r"has the shape \[1, 2, 2\], not 2 dimensions"),
    "cut short": (archive(a=array_file(data=b"\0" * 15)), r"a\.npy ends early"),
    "more in all": (archive(a=array_file("(4096, 4096)", data=LONG), b=array_file()), "more than 64 MiB in all"),
    "code in a header": (archive(a=array_file("__import__('os').abort()")), "has no header of an array"),
    "no array": (archive(a=b"text"), r"a\.npy has no header of an array"),
    "flipped bytes": (archive(a=array_file())[:40] + b"\xff" * 20 + archive(a=array_file())[60:], "."),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_arrays(tmp_path, name):
    content, said = ARCHIVES[name]
    (tmp_path / "m.npz").write_bytes(content)
    with pytest.raises(UserError, match=rf"m\.npz is damaged \(.*{said}.*\); delete it"):
        read_arrays(tmp_path / "m.npz", fix="delete it")


def test_arrays_come_back(tmp_path):
    arrays = {"a b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.asfortranarray(np.eye(3)), "d": np.ones((0, 2))}
    np.savez_compressed(tmp_path / "m.npz", **arrays)
    found = read_arrays(tmp_path / "m.npz", fix="")
    assert found.keys() == arrays.keys()
    assert all((found[name] == array).all() and found[name].dtype == array.dtype for name, array in arrays.items())


# writing


def test_nothing_is_written_through_links(tmp_path):
    secret, link = tmp_path / "secret", tmp_path / "link"
    secret.write_text("kept")
    link.symlink_to(secret)
    for write in (
        lambda: write_text(link, "x"),
        lambda: append_line(link, "x"),
        lambda: new_file(link).__enter__(),
        lambda: new_folder(link).__enter__(),
        lambda: check_writable(link, "--json"),
    ):
        with pytest.raises(UserError, match=r"link is a link to .*secret, and nothing is written through links"):
            write()
    assert secret.read_text() == "kept" and sorted(path.name for path in tmp_path.iterdir()) == ["link", "secret"]
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "made")
    with pytest.raises(UserError, match="nothing is written through links"):
        append_line(dangling, "x")
    assert not (tmp_path / "made").exists()


def test_files_and_folders_are_whole_or_not_there(tmp_path):
    write_text(tmp_path / "a", "old")
    os.umask(mask := os.umask(0))
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask
    with pytest.raises(RuntimeError), new_file(tmp_path / "a") as opened:
        opened.write(b"half")
        raise RuntimeError
    with new_folder(tmp_path / "f") as folder:
        (folder / "one").touch()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "f") as folder:
        (folder / "two").touch()
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old" and [path.name for path in (tmp_path / "f").iterdir()] == ["one"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "f"]


def test_left_overs_of_dead_processes_are_removed(tmp_path, monkeypatch):
    dead, alive = tmp_path / ".a.4194303.abcdefgh~", tmp_path / f".b.{os.getpid()}.abcdefgh~"
    dead.mkdir()
    (dead / "file").touch()
    alive.touch()
    (tmp_path / ".a.4194302.abcdefgh~").symlink_to(tmp_path)
    (tmp_path / ".mine~").touch()
    monkeypatch.setattr(disk, "_lives", lambda process: process == os.getpid())
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, ".mine~"}


# YAML


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 010", "010 is read in base 8 by YAML 1.1 and in base 10 by YAML 1.2; write it without the leading zero"),
        ("a: [-007]", "-007 is read in base 8"),
        ("a: 1:30", "1:30 is read in base 60 by YAML 1.1 and as text by YAML 1.2; write the number, or '1:30' in quotes"),
        ("a: 12:30:45.5", "12:30:45.5 is read in base 60"),
        ("a: yes", "yes is read as true by YAML 1.1 and as text by YAML 1.2; write true, or 'yes' in quotes for text"),
        ("a: {b: Off}", "Off is read as false"),
        ("on: 1", "on is read as true"),
        ("a: &x {b: 1}\nc: {<<: *x}", "merge keys (<<) are not supported; write the keys out (line 2, column 5)"),
        ("a: &x [*x]", "the alias *x is used inside the node"),
        ("a: !!int '7'", "the tag '!!int' is not supported; leave it out"),
        ("a: !!python/object/apply:os.abort []", "is not supported"),
        ("a: !!set {b}", "the tag '!!set' is not supported"),
        ("a: " + "[" * 30, "it is nested deeper than 24"),
        ("a: " + "9" * 5000, "the number 99999999... is too large"),
        ("a: 1e999", "the number 1e999 is too large"),
        ("a: 1\n---\nb: 2", "found another document"),
        ("a: \x07", "unacceptable character #x0007"),
        ("\n".join([f"a0: &a0 [{'x,' * 9}]", *(f"a{n}: &a{n} [{f'*a{n - 1},' * 9}]" for n in range(1, 40))]), "its aliases"),
    ],
)
def test_yaml_that_is_refused(tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        read(tmp_path / "r.yaml")
    assert str(refused.value).startswith(f"{tmp_path / 'r.yaml'} is not valid YAML: ") and said in str(refused.value)
    assert "\n" not in str(refused.value)
    if "\n" not in text:
        with pytest.raises(UserError, match=r"override .*: its value is not valid YAML"):
            override({"k": 1}, f"k={text.removeprefix('a: ') if text.startswith('a: ') else '{' + text + '}'}")


def test_yaml_means_what_it_says(tmp_path):
    text = (
        "a: 1_000\nb: 0x10\nc: 1e-3\nd: 2026-01-01\ne: '010'\nf: &x [1]\ng: *x\nh: ~\ni: true\nj: .5\nk: 5M\nl: '<<'\n3: =\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    assert read(tmp_path / "r.yaml") == {
        "a": 1000, "b": 16, "c": 0.001, "d": "2026-01-01", "e": "010", "f": [1], "g": [1], "h": None, "i": True, "j": 0.5,
        "k": "5M", "l": "<<", "3": "=",
    }  # fmt: skip
    (tmp_path / "large.yaml").write_text("a: 1\n" + "# " * 2**18)
    with pytest.raises(UserError, match=r"large\.yaml is 512 KiB, and at most 256 KiB are read"):
        read(tmp_path / "large.yaml")


TEXTS = ["yes", "No", "off", "09", "010", "1e-3", "12:30", "2026-01-01", "null", "0x1f", ".inf", "<<", "=", "1_0"]
OTHERS = ["", "a: b", " ", "\u00e9", "'", 1e-5, 1e300, -0.0, 12, True, None, [], {}]


@pytest.mark.parametrize("value", [*TEXTS, *OTHERS])
def test_what_is_written_is_read_back(tmp_path, value):
    (tmp_path / "r.yaml").write_text(dump({"a": [value]}))
    (found,) = read(tmp_path / "r.yaml")["a"]
    assert found == value and type(found) is type(value)


# messages


def test_messages_are_text():
    hostile = "\x1b[31mred\x07\0\u202e\x9b\ud800 [red]x[/] \u00e9\n\ttab"
    shown = r"\x1b[31mred\x07\x00\u202e\x9b\ud800 [red]x[/] " + "\u00e9\n\ttab"
    assert printable(hostile) == shown == str(UserError(hostile))
    assert str(UserError(f"name is {'x' * 9000!r}: too long")) == f"name is '{'x' * 59}...{'x' * 58}': too long"
    assert len(str(UserError("a b " * 9000))) <= 3000 and str(UserError("x" * 399)) == "x" * 399
    assert reason_of(OSError()) == "OSError" and reason_of(OSError(28, "No space")) == "No space"
    assert reason_of(OSError("4096 requested\nand 100 written")) == "4096 requested and 100 written"
    assert "KeyError" not in reason_of(KeyError("x")) and "--debug" in reason_of(KeyError("x"))
    assert nearest("aline", ["align", "orient"]) == "did you mean 'align'?"
    assert reading.size_of(2**20 * 3 // 2) == "1.5 MiB"
