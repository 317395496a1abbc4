"""Questions with their answers: the final answer of a text, answers that are the same, and files of questions."""

import json

import pytest

import distill
from distill.answering.final_answers import final_answer, same
from distill.errors import UserError

LETTERS = "How far?\nOptions:\n(A) 243 km\n(B) 162 km\n- (C) a long way"
BULLETS = "Where?\nOptions:\n- london\n- new york\n- a mural"


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("So far. The answer is (G).", "(G)"),
        ("So the answer is story book.", "story book"),
        ("It is 4 * 3.\n#### 1,200", "1,200"),
        ("Thus \\boxed{3/4}.", "3/4"),
        ("The answer is 3.5. I hope that this helps.", "3.5"),
        ("The answer is 4.\nNo: the answer is 5.", "5"),
        ("**Final answer:** 12", "12"),
        ("Answer: B\nbecause it is.", "B"),
        ("The answer is 4. " + "And then it goes on. " * 40, None),
        ("I do not know.", None),
        ("The answer is", None),
        ("The answers of science are many.", None),
    ],
)
def test_final_answers(text, wanted):
    assert final_answer(text) == wanted


@pytest.mark.parametrize(
    ("one", "other", "question", "wanted"),
    [
        ("1,200", "1200.0", "", True),
        ("$18", "18 dollars", "", True),
        ("1/2", "0.5", "", True),
        ("2 + 3 = 5", "5", "", True),
        ("-3", "3", "", False),
        ("18", "180", "", False),
        ("about 18", "18", "", True),
        ("world war 2", "2", "", False),
        ("Paris", "the paris", "", True),
        ("yes", "no", "", False),
        ("(A)", "A) 243 km", LETTERS, True),
        ("243 km", "A", LETTERS, True),
        ("a long way", "(C)", LETTERS, True),
        ("B", "C", LETTERS, False),
        ("london", "London, England", BULLETS, True),
        ("on a mural", "mural", BULLETS, True),
        ("new york", "london", BULLETS, False),
    ],
)
def test_same_answers(one, other, question, wanted):
    assert same(one, other, question) is wanted and same(other, one, question) is wanted


def test_questions(tmp_path):
    lines = [
        {"id": "cotqa:qasc/1", "text": "Q: Who?\nOptions:\n- (A) you\nA: Me.\nThe answer is (A)."},
        {"id": "cotqa:gsm8k/2", "text": "Question: 1 + 1?\n\nAnswer: So the answer is 2."},
        {"id": "med/1", "text": "Question: What?\n\nAnswer: This.\nThat."},
        {"id": "x", "text": "no question"},
        {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4", "source": "school"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = distill.questions("q.jsonl", out="chats.jsonl", leave_out=["GSM8K"], ask="End with it.")
    assert made == {"rows": 5, "chats": 3, "final_answers": 2, "left_out": 1, "no_question": 1, "file": "chats.jsonl"}
    found = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    assert [row["source"] for row in found] == ["cotqa:qasc", "med", "school"]
    assert [turn["content"] for turn in found[0]["messages"]] == [
        "Who?\nOptions:\n- (A) you\nEnd with it.",
        "Me.\nThe answer is (A).",
    ]
    assert found[2]["messages"][1] == {"role": "assistant", "content": "2 + 2 = 4\n#### 4"}
    kept = (tmp_path / "chats.jsonl").read_bytes()
    for row, options, message in (
        ({"id": "x", "text": "plain"}, {}, "q.jsonl: no row holds a question and its answer; nothing is written"),
        ({"question": "a", "answer": 4}, {}, r"line 1: question is 'a' and answer 4; both should be text"),
        ({"said": "a"}, {}, r"line 1: it has said; it needs question and answer, or a text"),
        (lines[0], {"leave_out": ["gsm9k"]}, "--leave-out is gsm9k, but no row's id or source has that word"),
        (lines[0], {"out": "nowhere/x.jsonl"}, "there is no folder nowhere"),
    ):
        (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=message):
            distill.questions("q.jsonl", **({"out": "chats.jsonl"} | options))
        assert (tmp_path / "chats.jsonl").read_bytes() == kept
