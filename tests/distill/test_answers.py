"""`distill answers`: the files that are written, resuming to the same bytes, sampling, pairs, and refusals."""

import errno
import json
import os
import re

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from transformers import GenerationConfig

import distill
from distill.answering import files, rows, speaking
from distill.answering.prompts import Prompt
from distill.answering.speaking import Said, Speaker
from distill.errors import Interrupted, UserError
from distill.recipe_file import check
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.sampling import drawn_tokens
from students.decoding import Decoder, GraphError
from tests.distill.two_processes import in_two

QUIET = Console(quiet=True)
DRAWN = {"tokens": 12, "temperature": 1.0, "console": QUIET}
ENDS = list(range(3, 320, 16))  # a teacher without a training ends by none in particular


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "SIZE", 4)
    monkeypatch.setattr("distill.answering.SIZE", 4)
    monkeypatch.setattr(speaking, "ends_of", lambda model, tokenizer: ENDS)


@pytest.fixture
def asked(tmp_path):
    """Twelve prompts of every form, as a file."""
    made = [{"prompt": "what is " + "the river " * (number % 4) + str(number)} for number in range(7)]
    turn = {"role": "user", "content": "and?"}
    made.append({"prompt": [turn]})
    made.append({"messages": [turn, {"role": "assistant", "content": "no"}], "source": "chats"})
    made += [{"messages": [turn, {"role": "assistant", "content": "no"}, turn]}] * 3
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return "asked.jsonl"


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if not file.name.startswith(".")}


def written(folder):
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


# what is written


def test_answers_are_a_source(chat_recipe, asked, tmp_path):
    made = distill.answers(chat_recipe, data=asked, out="out", unfinished=True, **DRAWN)
    found = written(tmp_path / "out")
    assert made["prompts"] == 12 == made["answered"] + made["unfinished"] + made["empty"] and made["most_tokens"] == 144
    assert len(found) == made["answered"] + sum(not row["finished"] for row in found) > 5
    assert {row["finished"] for row in found} == {True, False}
    last = next(row for row in found if "completion" in row)  # of several turns the new one alone counts
    assert [turn["role"] for turn in last["prompt"]] == ["user", "assistant", "user"]
    one = next(row for row in found if row["source"] == "chats")
    assert len(one["messages"]) == 2 and one["messages"][1]["content"] != "no"
    chat_recipe["data"]["train"] = [{"path": str(tmp_path / "out" / "*.jsonl")}]
    windows = Session.open(check(chat_recipe, "here")).windows
    assert windows.batch(0, 1).loss_weights.sum() > 0
    without = distill.answers(chat_recipe, data=asked, out="whole", **DRAWN)
    assert all(row["finished"] for row in written(tmp_path / "whole")) and without["unfinished"] == made["unfinished"]


def test_each_row_is_its_own(chat_recipe, asked, tmp_path):
    """Batches of any size, and fewer rows, give the same answers; another seed gives others."""
    for name, options in {"a": {"batch": 1}, "b": {"batch": 3}, "c": {"limit": 6}, "d": {"seed": 1}}.items():
        distill.answers(chat_recipe, data=asked, out=name, unfinished=True, **DRAWN, **options)
    one, several, fewer, other = (written(tmp_path / name) for name in "abcd")
    assert one == several and one[: len(fewer)] == fewer != [] and one != other


def test_as_transformers_answers(chat_recipe):
    """Greedy answers of a padded batch are those of the prompt alone by transformers' own generate."""
    teacher = Session.open(check(chat_recipe, "here")).teacher
    options = {"tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    speaker = Speaker(teacher.model, teacher.tokenizer, **options)
    prompts = [[5, 9, 11], [7, 8, 9, 10, 12, 13, 14, 20], [6]]
    for prompt, said in zip(prompts, speaker(prompts, [0, 1, 2]), strict=True):
        config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=ENDS, pad_token_id=ENDS[0])
        alone = teacher.model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        finished = alone[-1] in ENDS
        text = teacher.tokenizer.decode(alone[:-1] if finished else alone, skip_special_tokens=True)
        assert said == Said(text, finished, len(alone))


def test_what_cannot_be_held_in_place(chat_recipe, asked, tmp_path, monkeypatch):
    """A family whose cache no Decoder holds answers by transformers' generate, the same."""
    first = distill.answers(chat_recipe, data=asked, out="a", unfinished=True, **DRAWN)

    def refuse(*_, **__):
        raise GraphError("not this one")

    monkeypatch.setattr(Decoder, "__init__", refuse)
    monkeypatch.setattr(Decoder, "release", lambda self: None)
    second = distill.answers(chat_recipe, data=asked, out="b", unfinished=True, **DRAWN)
    assert (first["decoding"], second["decoding"]) == ("students.replayed", "transformers' generate")
    assert written(tmp_path / "a") == written(tmp_path / "b")


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (2.0, 0.3), (1.0, 1e-6)])
def test_what_is_drawn(temperature, top_p):
    """Frequencies are those of the distribution, cut to its likeliest tokens."""
    scores = torch.tensor([0.3, 2.0, -1.0, 1.0, -9.0, 0.0])
    shares = (scores / temperature).softmax(-1)
    order = shares.argsort(descending=True).tolist()
    kept, total = [], 0.0
    for token in order:
        if total < top_p:
            kept.append(token)
            total += shares[token].item()
    numbers = torch.from_numpy(np.random.default_rng(0).random(20_000))
    drawn = drawn_tokens(scores.expand(20_000, -1), numbers, temperature, top_p)
    found = drawn.bincount(minlength=6) / 20_000
    wanted = torch.tensor([shares[token].item() / total if token in kept else 0.0 for token in range(6)])
    assert (found - wanted).abs().max() < 0.012 and set(drawn.tolist()) <= set(kept)
    edges = drawn_tokens(scores.expand(2, -1), torch.tensor([0.0, 1 - 2**-53]), temperature, top_p)
    assert edges.tolist() == [kept[0], kept[-1]]


# going on


def test_goes_on_to_the_same_bytes(chat_recipe, asked, tmp_path, monkeypatch):
    distill.answers(chat_recipe, data=asked, out="whole", **DRAWN)
    with monkeypatch.context() as patched:
        asks = iter(range(1000))
        patched.setattr(Stopper, "due", lambda self: "enough" if next(asks) > 30 else None)
        with pytest.raises(Interrupted, match="What is written stays"):
            distill.answers(chat_recipe, data=asked, out="cut", **DRAWN)
    part = contents(tmp_path / "cut")
    assert 1 < len(part) < len(contents(tmp_path / "whole"))
    (tmp_path / "cut" / "answers-00009.jsonl").touch()  # is nobody's, and is left alone
    (tmp_path / "cut" / "answers-00009.jsonl").unlink()
    assert distill.answers(chat_recipe, data=asked, out="cut", **DRAWN)["prompts"] == 12
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    (tmp_path / "cut" / "answers-00001.jsonl").write_text("{}\n")  # damaged
    (tmp_path / "cut" / "answers-00002.json").unlink()
    distill.answers(chat_recipe, data=asked, out="cut", **DRAWN)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


TWO = """
import sys, yaml, distill
from distill.answering import files, speaking
import distill.answering
files.SIZE = distill.answering.SIZE = 4
speaking.ends_of = lambda model, tokenizer: list(range(3, 320, 16))
distill.answers(yaml.safe_load(open("recipe.yaml")), data="asked.jsonl", out="two", tokens=12, temperature=1.0)
"""


def test_two_processes_write_the_same(chat_recipe, asked, tmp_path, monkeypatch):
    distill.answers(chat_recipe, data=asked, out="whole", **DRAWN)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(chat_recipe))
    (tmp_path / "two.py").write_text(TWO)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(os.path.dirname(distill.__file__))]))
    root = os.path.dirname(os.path.dirname(distill.__file__))
    (tmp_path / "two.py").write_text(f"import sys; sys.path.insert(0, {root!r})\n" + TWO)
    code, said = in_two(str(tmp_path / "two.py"))
    assert code == 0, said
    assert contents(tmp_path / "two") == contents(tmp_path / "whole")


# pairs


def test_pairs(chat_recipe, tmp_path, monkeypatch):
    turn = {"role": "user", "content": "2 + 2?"}
    answer = {"role": "assistant", "content": "It is two and two. The answer is 4."}
    lines = [{"messages": [turn, answer]}, {"prompt": "2 + 2?", "completion": "The answer is 4."}] * 2
    lines.append({"messages": [turn, {"role": "assistant", "content": "Four, I think."}]})
    (tmp_path / "reference.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = iter(["So the answer is 5.", "The answer is 4.0", "Well.", "The answer is", "Five."])

    def call(self, prompts, numbers):
        return [Said(next(said), len(numbers) < 9, 3) for _ in numbers]

    monkeypatch.setattr(Speaker, "__call__", call)
    made = distill.answers(chat_recipe, data="reference.jsonl", out="pairs", pairs=True, **DRAWN)
    assert {name: made[name] for name in rows.PAIRS} == {
        "pairs": 1, "right": 1, "unstated": 2, "no_reference": 1, "unfinished": 0, "empty": 0
    }  # fmt: skip
    (pair,) = written(tmp_path / "pairs")
    assert pair["prompt"][-1]["content"] == "2 + 2?" and "answer is 4" in pair["chosen"][0]["content"]
    assert pair["rejected"] == [{"role": "assistant", "content": "So the answer is 5."}]


def test_a_shard_without_rows_has_no_file(tmp_path):
    facts = {"reference": "m", "model": "m", "prompts": "0" * 64, "count": 1, "tokens": 8, "temperature": 1.0, "top_p": 1.0}
    folder = files.Folder(tmp_path / "pairs", files.Facts(kind="pairs", seed=0, unfinished=False, **facts))
    folder.begin()
    folder.write(0, [], {"right": 1})
    assert folder.missing() == [] and folder.counts() == {"right": 1} and not list(folder.path.glob("*.jsonl"))
    (folder.path / "answers-00000.jsonl").write_text("{}\n")
    assert folder.missing() == [0]


def test_a_pair_needs_an_end():
    prompt = Prompt(0, [{"role": "user", "content": "1?"}], "The answer is 1.", "x", "x")
    cut = Said("The answer is 2", False, 4)
    assert rows.outcome(prompt, cut, pairs=True) == "unfinished"
    assert rows.rows_of([prompt], [cut], pairs=True, unfinished=True)[0] == []


def test_a_student_answers(chat_recipe, chat_teacher, asked, tmp_path, untrained_run):
    made = distill.answers(chat_recipe, data=asked, out="own", student=untrained_run, unfinished=True, **DRAWN)
    assert made["decoding"] == "students.replayed" and written(tmp_path / "own")
    with pytest.raises(UserError, match=r"--out is own, which holds other answers: the model that answers"):
        distill.answers(chat_recipe, data=asked, out="own", unfinished=True, **DRAWN)


# what is refused


BAD = {
    "no prompt": ({"prompt": "  "}, {}, r"asked.jsonl, row 1: it has no prompt; write one"),
    "no column": ({"question": "why?"}, {}, r"there is no column 'messages or prompt' in .*asked.jsonl; there are question"),
    "nothing asked": (
        {"messages": [{"role": "assistant", "content": "so"}]},
        {},
        r"asked.jsonl.*no turn that asks something comes before",
    ),
    "too long": (
        {"prompt": "river " * 900},
        {},
        r"row 1: the prompt is [\d,]+ tokens and --tokens is 12, but the model has",
    ),
    "no reference": ({"prompt": "why?"}, {"pairs": True}, r"row 1: it has no reference answer, which --pairs chooses"),
    "a range": ({"prompt": "why?"}, {"top_p": 0.0}, r"--top-p is 0.0; it takes a number above 0 up to 1"),
    "a file": ({"prompt": "why?"}, {"out": "asked.jsonl"}, r"--out is asked.jsonl, which is a file; name a folder"),
    "not ours": ({"prompt": "why?"}, {"out": "full"}, r"--out is full, which holds something other than answers"),
    "no student": ({"prompt": "why?"}, {"student": "nowhere"}, r"nowhere cannot be loaded as a student"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(chat_recipe, tmp_path, name):
    row, options, message = BAD[name]
    (tmp_path / "asked.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=message):
        distill.answers(chat_recipe, **({"data": "asked.jsonl", "out": "out"} | DRAWN | options))
    assert not list(tmp_path.glob("out/*.jsonl")) and (tmp_path / "full" / "mine.txt").exists()


def test_a_teacher_without_a_template(tiny_recipe, asked):
    with pytest.raises(UserError, match=r"row 1: the teacher's tokenizer has no chat template to write prompts with"):
        distill.answers(tiny_recipe, data=asked, out="out", **DRAWN)


@pytest.mark.parametrize(("option", "said"), [({"tokens": 9}, "--tokens is 12 there, and 9"), ({"seed": 3}, "--seed is 0")])
def test_other_answers(chat_recipe, asked, option, said):
    distill.answers(chat_recipe, data=asked, out="out", limit=1, **DRAWN)
    with pytest.raises(UserError, match=rf"holds other answers: {re.escape(said)}"):
        distill.answers(chat_recipe, data=asked, out="out", limit=1, **DRAWN | option)


def test_a_full_disk(chat_recipe, asked, tmp_path, monkeypatch):
    """One message; what was written stays, and the same call goes on."""
    distill.answers(chat_recipe, data=asked, out="whole", **DRAWN)
    replace = os.replace

    def full(source, target):
        if str(target).endswith("answers-00001.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"answers-00001.jsonl cannot be written: No space left on device; make room"):
            distill.answers(chat_recipe, data=asked, out="cut", **DRAWN)
    assert (tmp_path / "cut" / "answers-00000.jsonl").exists()
    distill.answers(chat_recipe, data=asked, out="cut", **DRAWN)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_plan_runs_nothing(chat_recipe, asked, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.answering.load_teacher", None)
    made = distill.answers(chat_recipe, data=asked, out="out", plan=True, tokens=100, console=QUIET)
    assert made["prompts"] == 12 and made["most_tokens"] == 1200 and not (tmp_path / "out").exists()
