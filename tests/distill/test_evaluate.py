"""Evaluations: planted models that must score 1 or chance, formulas by hand, seeds, and what is not run."""

import json
import lzma
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distill.errors import UserError
from distill.evaluation import questions, scoring, tasks
from distill.evaluation.judging import not_run
from distill.evaluation.recall import recall
from distill.evaluation.recall.families import FAMILIES, GRIDS, make
from distill.evaluation.recall.item import Tokens
from distill.evaluation.scoring import Marked, score
from distill.evaluation.suite import SIX
from distill.evaluation.suites import SUITES, find_suite
from distill.evaluation.target import task_source
from distill.evaluation.task_files import read_items


class Planted(nn.Module):
    """Says of every sequence it knows the next token, and of any other that all tokens are alike."""

    def __init__(self, known, vocabulary):
        super().__init__()
        self.next = {tuple(ids[:place]): ids[place] for ids in known for place in range(1, len(ids))}
        self.embeddings = nn.Linear(vocabulary, vocabulary, bias=False)
        self.embeddings.weight.data = 50.0 * torch.eye(vocabulary)
        self.config = SimpleNamespace()

    def get_output_embeddings(self):
        return self.embeddings

    def hidden(self, ids, documents):
        hidden = torch.zeros(*ids.shape, self.embeddings.out_features)
        for row, tokens in enumerate(ids.tolist()):
            for place in range(len(tokens)):
                after = self.next.get(tuple(tokens[: place + 1]))
                if after is not None:
                    hidden[row, place, after] = 1.0
        return hidden


ITEMS = [
    {"ctx": f"Question: number {index}?\nAnswer:", "choices": ["aa", "bb", "cc", "dd"], "label": index % 4}
    for index in range(8)
]


def right_sequences(teacher, questions):
    pairs = [question.pairs[question.label] for question in questions]
    return [text.ids for text in tasks.marked(teacher, pairs)]


@pytest.fixture
def task_folder(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    with lzma.open(folder / "arc_easy.jsonl.xz", "wt") as file:
        file.writelines(json.dumps(item) + "\n" for item in ITEMS)
    lines = [{"ctx": f"the {word} and the", "choices": [word], "label": 0} for word in ("cat", "dog", "bird")]
    (folder / "lambada.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


# the one way to a score


def test_scores_are_the_log_probabilities_of_single_passes(teacher):
    draw = torch.Generator().manual_seed(3)
    texts = [
        Marked(torch.randint(1, 320, (length,), generator=draw).tolist(), ((1, 2), (length - 3, length)))
        for length in (5, 90, 17, 64, 5)
    ]
    for text, answers in zip(texts, score(teacher, None, texts), strict=True):
        logprobs = teacher.model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
        for (start, end), answer in zip(text.spans, answers, strict=True):
            wanted = torch.tensor(text.ids[start:end])
            expected = logprobs[start - 1 : end - 1].gather(-1, wanted[:, None]).sum()
            assert answer.logprob == pytest.approx(expected.item(), rel=2e-5)
            assert answer.greedy == (logprobs[start - 1 : end - 1].argmax(-1).tolist() == wanted.tolist())


def test_batches_hold_everything_once_and_no_more_than_asked():
    lengths = [3, 50, 7, 7, 90, 1]
    found = list(scoring.batches(lengths, 100))
    assert sorted(index for batch in found for index in batch) == list(range(6))
    assert all(len(batch) * max(lengths[index] for index in batch) <= 100 for batch in found)
    assert list(scoring.batches([500], 100)) == [[0]]


def test_a_span_needs_something_before_it():
    with pytest.raises(ValueError, match="do not lie after the first of 3 tokens"):
        Marked([1, 2, 3], ((0, 1),))


def test_pairs_are_split_as_one_text(tokenizer):
    ((context, continuation),) = scoring.split(tokenizer, [("The river ", "runs")])
    assert context + continuation == tokenizer("The river runs")["input_ids"]
    assert tokenizer.decode(continuation) == " runs"


# tasks


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_a_model_that_knows_scores_one_and_one_that_does_not_scores_chance(teacher, name):
    questions = [tasks.TASKS[name].question(item) for item in ITEMS]
    knows = tasks.run_task(teacher, Planted(right_sequences(teacher, questions), 320), name, questions)
    assert knows["score"] == 1.0 and knows["correct"] == "1" * 8 and knows["error"] == 0.0
    guesses = tasks.run_task(teacher, Planted([], 320), name, questions)
    assert guesses["score"] == guesses["chance"] == 0.25
    assert guesses["error"] == pytest.approx((0.25 * 0.75 / 7) ** 0.5)


def test_winogrande_scores_the_rest_of_the_sentence(teacher):
    items = [
        {"contexts": ["Ann saw Sue so Ann", "Ann saw Sue so Sue"], "target": "ran off.", "label": n % 2} for n in (0, 1)
    ]
    items[1]["contexts"] = ["Tom saw Bob so Tom", "Tom saw Bob so Bob"]
    questions = [tasks.TASKS["winogrande"].question(item) for item in items]
    assert questions[0].pairs[1] == ("Ann saw Sue so Sue", " ran off.")
    assert (
        tasks.run_task(teacher, Planted(right_sequences(teacher, questions), 320), "winogrande", questions)["score"] == 1.0
    )
    assert tasks.run_task(teacher, Planted([], 320), "winogrande", questions)["score"] == 0.5


def test_lambada_is_right_when_greedy_decoding_says_the_word(teacher):
    items = [{"ctx": f"a {word}, and a", "choices": [word], "label": 0} for word in ("cat", "dog")]
    questions = [tasks.TASKS["lambada"].question(item) for item in items]
    knows = tasks.run_task(teacher, Planted(right_sequences(teacher, questions), 320), "lambada", questions)
    assert knows["score"] == 1.0 and knows["perplexity"] == pytest.approx(1.0) and knows["chance"] == 0.0
    assert tasks.run_task(teacher, Planted([], 320), "lambada", questions)["score"] == 0.0


def test_norms_are_by_characters(teacher, monkeypatch):
    question = questions.cloze({"ctx": "x", "choices": ["ab", "abcdefgh"], "label": 1})
    answers = [[scoring.Answer(-2.0, False)], [scoring.Answer(-4.0, False)]]
    monkeypatch.setattr(tasks, "score", lambda *arguments: answers)
    found = tasks.run_task(teacher, None, "arc_challenge", [question])
    assert (found["acc"], found["acc_norm"], found["score"]) == (0.0, 1.0, 1.0)


def test_letters_are_permuted_and_counted(teacher):
    items = [{"ctx": f"Question: {n}?\nAnswer:", "choices": ["w", "x", "y", "z"], "label": 2} for n in range(40)]
    questions = [tasks.letters(item) for item in items]
    assert questions[0] == tasks.letters(items[0]) and {question.label for question in questions} == {0, 1, 2, 3}
    for question in questions:
        assert f"{'ABCD'[question.label]}. y" in question.pairs[0][0]
    counted = tasks.run_task(teacher, Planted([], 320), "mmlu_letters", questions)["letters"]
    assert counted == {"A": 40, "B": 0, "C": 0, "D": 0}


def test_long_questions_are_cut_on_the_left(teacher):
    ((text,)) = tasks.marked(teacher, [("word " * 600 + "end", " yes")])
    assert len(text.ids) == teacher.config.max_position_embeddings + 1
    assert teacher.tokenizer.decode(text.ids).endswith("end yes")


def suite_of(folder, **changes):
    from dataclasses import replace

    return replace(SUITES["quick"], task_source=folder, **changes)


def test_suites_name_what_exists():
    from distill.evaluation.suites import EVALUATIONS

    for name, suite in SUITES.items():
        assert suite.name == name and set(suite.baselines) <= set(suite.evaluations) <= set(EVALUATIONS)
        assert set(SIX) <= set(suite.tasks) <= set(tasks.TASKS)


def test_what_is_missing_is_not_run(teacher, task_folder):
    found = tasks.row(teacher, None, None, suite_of(task_folder))
    assert list(found) == list(SIX)
    assert found["arc_easy"]["items"] == 8 and found["lambada"]["items"] == 3
    assert found["piqa"] == {"not_run": f"no piqa.jsonl (.xz, .gz) in {task_folder}"}
    without = tasks.row(teacher, None, None, suite_of(None))
    assert all("--tasks or DISTILL_TASKS" in result["not_run"] for result in without.values())
    listed = not_run({"teacher": {"tasks": found}, "student": {"tasks": found}}, suite_of(task_folder))
    assert {
        "rows": ["teacher", "student"],
        "evaluation": "tasks",
        "part": "piqa",
        "reason": found["piqa"]["not_run"],
    } in listed
    few = tasks.row(teacher, None, None, suite_of(task_folder, tasks=("mmlu_letters",)))
    assert "no mmlu_cloze.jsonl" in few["mmlu_letters"]["not_run"]


def test_some_items_are_always_the_same(task_folder):
    file = task_folder / "arc_easy.jsonl.xz"
    some = read_items(file, 3)
    assert len(some) == 3 and some == read_items(file, 3) and all(item in ITEMS for item in some)
    assert read_items(file, 100) == ITEMS


def test_mistakes_in_files_and_names(teacher, task_folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no suite 'quik'; did you mean 'quick'"):
        find_suite("quik")
    with pytest.raises(UserError, match=r"--tasks is .*nowhere, but there is no such folder"):
        task_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no task's file"):
        task_source(tmp_path / "empty")
    monkeypatch.setenv("DISTILL_TASKS", str(task_folder))
    assert task_source(None) == task_folder
    monkeypatch.setattr("distill.evaluation.target.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        task_source("harness")
    (task_folder / "piqa.jsonl").write_text('{"ctx": "a"}\n')
    with pytest.raises(UserError, match=r"piqa.jsonl, line 1, is not in the form of piqa: choices is missing"):
        tasks.row(teacher, None, None, suite_of(task_folder, tasks=("piqa",)))
    (task_folder / "piqa.jsonl").write_text('{"ctx": ')
    with pytest.raises(UserError, match=r"piqa.jsonl cannot be read"):
        tasks.row(teacher, None, None, suite_of(task_folder, tasks=("piqa",)))
    (task_folder / "piqa.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no line"):
        tasks.row(teacher, None, None, suite_of(task_folder, tasks=("piqa",)))


# recall


@pytest.mark.parametrize("family", FAMILIES)
def test_recall_families(teacher, family):
    tokens, length = Tokens(teacher.tokenizer), 700
    texts = make(tokens, family, length, 3)
    assert texts == make(tokens, family, length, 3) and texts != make(tokens, family, length, 3, seed=1)
    assert all(0.4 * length < len(text.ids) <= length for text in texts)
    for text in texts:  # what is asked for stands in the text before
        for start, end in text.spans:
            answer, before = text.ids[start:end], text.ids[:start]
            said = teacher.tokenizer.decode(answer).strip()
            assert set(answer) <= set(before) and said in teacher.tokenizer.decode(before)
    knows = Planted([text.ids for text in texts], 320)
    (cell,) = recall(teacher, knows, family, [length], 3)
    assert cell["recalled"] == cell["trials"] == sum(len(text.spans) for text in texts) and cell["score"] == 1.0
    (cell,) = recall(teacher, Planted([], 320), family, [length], 3)
    assert cell["recalled"] == 0


def test_a_needle_stands_where_the_grid_says(teacher):
    tokens = Tokens(teacher.tokenizer)
    depths = (0.0, 0.5, 1.0)
    places = []
    for text in make(tokens, "needle", 480, 3, depths):
        whole = teacher.tokenizer.decode(text.ids)
        places.append(whole.index("The special magic number for") / len(whole))
    assert places[0] < 0.05 and 0.25 < places[1] < 0.6 and places[2] > places[1]
    cells = recall(teacher, Planted([], 320), "needle", [480], 2, depths)
    assert [(cell["length"], cell["depth"], cell["trials"]) for cell in cells] == [(480, depth, 2) for depth in depths]
    assert GRIDS == ("needle",)
