"""Lines of task files: which labels are accepted, and refusals with file and line."""

import gzip
import json
import lzma

import pytest

from distill.errors import UserError
from distill.evaluation.task_files import check_folder, read_questions

NO_INDEX = "it must be the index of the right choice, 0 to 2"
ITEM = {"ctx": "x", "choices": ["a", "b", "c"]}


@pytest.mark.parametrize("label", [2, "2", "02"])
@pytest.mark.parametrize(
    ("task", "item"),
    [
        ("piqa", ITEM),
        ("winogrande", {"contexts": ["a", "b", "c"], "target": "t"}),
        ("mmlu_letters", ITEM),
        ("mmlu_cloze", ITEM),
    ],
)
def test_labels(tmp_path, task, item, label):
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({**item, "label": label}) + "\n")
    (question,) = read_questions(task, file, None)
    shown = question.pairs[0][0].splitlines()  # with letters the question, then the choices in an order of their own
    right = [place for place, line in enumerate(shown[1:]) if line.endswith(". c")] if task == "mmlu_letters" else [2]
    assert [question.label] == right


@pytest.mark.parametrize(
    ("label", "said"),
    [
        *[
            (label, "it must be the index of the right choice, 0 to 2")
            for label in ("A", "b", "", " 1", "1.0", "-1", "²", "٣")
        ],
        *[(label, "it must be the index of the right choice, 0 to 2") for label in (1.0, 0.5, True, False, None, [1])],
        (-1, "but the indexes of its 3 choices are 0 to 2;"),
        (3, "but the indexes of its 3 choices are 0 to 2; labels count from 0;"),
        ("3", "but the indexes of its 3 choices are 0 to 2; labels count from 0;"),
        (7, "but the indexes of its 3 choices are 0 to 2;"),
    ],
)
@pytest.mark.parametrize("task", ["piqa", "winogrande", "mmlu_letters", "squad"])
def test_labels_that_are_refused(tmp_path, task, label, said):
    """With the line, blank ones counted, whichever items a suite would draw."""
    item = {**ITEM, "contexts": ["a", "b", "c"], "target": "t"}
    file = tmp_path / "t.jsonl"
    good = json.dumps({**item, "label": 0}) + "\n"
    file.write_text(good + "\n" + 8 * good + json.dumps({**item, "label": label}) + "\n")
    with pytest.raises(UserError) as caught:
        read_questions(task, file, 1)
    assert f"{file}, line 11, is not in the form of {task}: label is {label!r}" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("task", "changes", "said"),
    [
        ("piqa", {"choices": "abc"}, "choices is 'abc', which is not a list of 2 or more texts"),
        ("piqa", {"choices": ["a"]}, "not a list of 2 or more texts"),
        ("piqa", {"choices": ["a", 5]}, "not a list of 2 or more texts"),
        ("piqa", {"ctx": None}, "ctx is None, which is not a text"),
        ("winogrande", {"contexts": "ab"}, "contexts is 'ab', which is not a list"),
        ("winogrande", {"target": 3}, "target is 3, which is not a text"),
        ("mmlu_letters", {"choices": list("abcde")}, "there are 5 choices, but letters only for 4"),
        ("lambada", {"choices": []}, "not a list of 1 or more texts"),
        ("piqa", {"choices": ["a", "b\ud800"]}, "choices is .*, which holds half of a character"),
        ("piqa", {"ctx": ["a"] * 10_000}, r"ctx is \['a', 'a', 'a', 'a', 'a', 'a', \.\.\.\], which is not a text"),
        ("piqa", {"label": 10**400}, "label is a number of 1329 bits, but the indexes"),
        ("piqa", {"label": float("nan")}, "label is nan; it must be the index"),
    ],
)
def test_items_that_are_refused(tmp_path, task, changes, said):
    item = {**ITEM, "contexts": ["a", "b"], "target": "t", "label": 0, **changes}
    (tmp_path / "t.jsonl").write_text(json.dumps(item))
    with pytest.raises(UserError, match=f"line 1, is not in the form of {task}: .*{said}"):
        read_questions(task, tmp_path / "t.jsonl", None)


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({**ITEM, "label": 0}) + '\n\n{"ctx": \n')
    with pytest.raises(UserError, match=r"t\.jsonl cannot be read: line 3: "):
        read_questions("piqa", tmp_path / "t.jsonl", None)


def test_a_labelled_answer_among_several(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({**ITEM, "label": "1"}) + "\n" + json.dumps(ITEM))
    assert [question.pairs for question in read_questions("squad", tmp_path / "t.jsonl", None)] == [
        [("x", " b")],
        [("x", " a")],
    ]


GOOD = json.dumps({**ITEM, "label": 0}) + "\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1, 2]", "line 2: \\[1, 2\\] is not an object"),
        ("null", "line 2: None is not an object"),
        ("[" * 100_000, "line 2: it is nested too deep"),
        ('{"ctx": ' + "1" * 5000 + "}", "line 2: a number has more digits"),
        (b'{"ctx": "\xff"}', "line 2, is not UTF-8 text: byte 9 is 0xff"),
        ('{"a": 1, "b": 2}', "line 2, is not in the form of piqa: ctx is missing; there are a, b"),
        ('{"ctx": "x", "choices": ["a", "b"]}', "line 2, is not in the form of piqa: label is missing"),
        (" " * 16_000_001, "line 2, is longer than 16,000,000 bytes, the most that it may have; cut it, or leave it out"),
    ],
    ids=["a list", "null", "deep", "digits", "no UTF-8", "other keys", "a key gone", "long"],
)
def test_lines_that_are_refused(tmp_path, line, said):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "piqa.jsonl").write_bytes(GOOD.encode() + line + b"\n" + GOOD.encode())
    with pytest.raises(UserError, match=said) as caught:
        read_questions("piqa", tmp_path / "piqa.jsonl", 1)
    assert "piqa.jsonl" in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_packed_files_that_are_damaged(tmp_path, pack):
    file = tmp_path / {gzip.compress: "piqa.jsonl.gz", lzma.compress: "piqa.jsonl.xz"}[pack]
    whole = pack(GOOD.encode() * 99)
    for content, said in (
        (whole[:-9], "ends early"),
        (whole[:20], "ends early, before its first line ends"),
        (GOOD.encode(), r"is not a \.[gx]z file: it begins with b'\{\"ctx"),
        (pack(b""), "holds no line"),
        (b"", r"is not a \.[gx]z file"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=said):
            read_questions("piqa", file, None)
    file.write_bytes(whole)
    assert len(read_questions("piqa", file, None)) == 99


def test_folders_of_task_files(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        check_folder(tmp_path / "gone")
    with pytest.raises(UserError, match=r"holds no task's file; it should hold one of winogrande\.jsonl"):
        check_folder(tmp_path)
    (tmp_path / "piqa.jsonl").mkdir()
    with pytest.raises(UserError, match=r"piqa\.jsonl is a folder; a task's file holds JSON lines"):
        check_folder(tmp_path)
