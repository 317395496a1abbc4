"""Overlap of held-out and training text: whole documents, near copies, parts, and none."""

import io
import json
import lzma

import numpy as np
import pytest
from rich.console import Console

import distill
from distill.evaluation.table import overlap_line
from distill.recipe import TextSource
from distill.reports import headline
from distill.runs.session import Session
from distill.shipped import shipped_folder
from distill.text import overlap as module
from distill.text.overlap import RUN, overlap, sentence, suspicious
from distill.text.windows import Windows
from tests.distill.prepared_folders import write

CHANCE = np.random.default_rng(5)
END = 0


def document(length):
    return CHANCE.integers(1, 40_000, length).tolist()


@pytest.fixture
def windows(tmp_path):
    """Windows over documents, each ended."""

    def windows(name, documents):
        ended = [[*ids, END] for ids in documents]
        (tmp_path / name).mkdir()
        starts = np.cumsum([0, *map(len, ended)])[:-1]
        write(tmp_path / name, np.concatenate(ended).astype(np.uint32), starts, np.zeros(len(ended)), ["x"])
        return Windows(tmp_path / name, 8, None)

    return windows


ONE, TWO, THREE = document(100), document(60), document(200)


@pytest.mark.parametrize(
    ("heldout", "exact", "near", "runs"),
    [
        ([document(100), document(50)], 0, 0, 0.0),
        ([ONE, document(99)], 1, 1, 0.5),  # 88 runs of 88 + 87
        ([ONE, TWO, THREE], 3, 3, 1.0),
        ([[*ONE[:60], 7, *ONE[61:]], document(99)], 0, 1, 0.43),  # one other token costs 13 runs: 75 of 175
        ([[*document(10), *ONE[20:], *document(10)]], 0, 1, 0.77),  # 68 of 88
        ([ONE[:40] + document(60)], 0, 0, 0.32),  # 28 of 88
        ([[*ONE[50:], *TWO[:12]]], 0, 1, 0.76),  # no run goes over a border: 38 of 50
        ([TWO[:12], [5]], 0, 0, 0.0),  # shorter than a run
        ([TWO[:RUN]], 0, 1, 1.0),
    ],
)
def test_documents(windows, heldout, exact, near, runs):
    train = windows("train", [document(80), ONE, TWO, document(7), THREE])
    found = overlap([train], windows("heldout", heldout))
    assert (found["documents"], found["exact"], found["near"]) == (len(heldout), exact, near)
    assert found["runs"] == pytest.approx(runs, abs=0.01)
    assert suspicious(found) == bool(exact or near)
    tokens = sum(len(ids) + 1 for ids in heldout)
    assert found["exact_tokens"] == pytest.approx(sum(len(ids) + 1 for ids in heldout if ids in (ONE, TWO, THREE)) / tokens)


def test_a_run_across_the_border_of_two_documents_is_none(windows):
    found = overlap([windows("train", [ONE, TWO])], windows("heldout", [[*ONE[-6:], *TWO[:6]], document(30)]))
    assert found["runs"] == 0.0


@pytest.mark.parametrize("chunk", [RUN, 50, 1 << 20])
def test_chunks_lose_nothing(windows, monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert overlap([windows("train", [document(33), ONE, TWO])], windows("heldout", [ONE, TWO]))["runs"] == 1.0


def test_only_a_sample_of_long_texts_is_looked_at(windows, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 150)
    monkeypatch.setattr(module, "MOST", 150)
    found = overlap([windows("train", [document(99), ONE, THREE])], windows("heldout", [ONE, document(100), THREE]))
    assert (found["sampled"], found["searched"], found["exact"], found["near"]) == (2, 150, 2, 0)  # ONE ends behind 150


def test_the_line_says_what_was_compared_and_what_it_means():
    found = {"documents": 55, "exact": 0, "exact_tokens": 0.0, "sampled": 4, "near": 0, "runs": 0.0031, "searched": 900}
    assert overlap_line({"overlap": found}) == (
        "overlap of held-out and training text: 0 of 55 held-out documents are in the training text word for word, and 0 of "
        "the 4 that were searched for copied passages have half or more of their text there (of all their sequences of 13 "
        "tokens, 0.3% occur in the training text): no copied document was found, so the results count as held-out results"
    )
    for changes in ({"exact": 1, "exact_tokens": 0.25}, {"near": 1}):
        said = overlap_line({"overlap": found | changes})
        assert said.endswith("not held-out results; remove them from data.train or data.heldout")


def with_heldout(recipe, path):
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"heldout": [TextSource(path=str(path))]})})


def test_a_run_whose_heldout_text_is_training_text(tiny_recipe, tmp_path, monkeypatch, text_files):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    tiny_recipe["data"]["heldout"] = tiny_recipe["data"]["train"]
    tiny_recipe["stages"] = tiny_recipe["stages"][:1]
    console = Console(file=io.StringIO(), width=400)
    folder = distill.run(tiny_recipe, runs=tmp_path / "runs", console=console)
    judged = folder.read("evaluations.json")["final"]
    assert "warning: 18 of 18 held-out documents" in console.file.getvalue()
    assert judged["overlap"]["exact"] == judged["overlap"]["documents"] == 18
    assert judged["overlap"]["exact_tokens"] == judged["overlap"]["runs"] == 1.0
    said = "18 of 18 held-out documents (100.0% of the tokens) are in the training text word for word"
    assert said in sentence(judged["overlap"]) and said in overlap_line(judged)
    assert "results on these documents are not held-out results; remove them from data.train" in headline(judged).caption
    assert said in (folder.path / "report.html").read_text() and said in (folder.path / "report.md").read_text()
    recipe = folder.recipe()
    session = Session.open(with_heldout(recipe, text_files / "heldout.jsonl"), trains=False)
    assert session.overlap["exact"] == 0 and not suspicious(session.overlap)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "empty"))
    gone = Session.open(with_heldout(recipe, text_files / "heldout.jsonl"), trains=False)
    assert gone.overlap is None, "the training text was prepared for this alone"


def test_the_shipped_texts_are_apart(windows):
    """By words, which are quicker than tokens."""
    words, parts = {}, {}
    for part in ("train", "heldout"):
        with lzma.open(shipped_folder() / "text" / f"{part}.jsonl.xz", "rt") as file:
            rows = [json.loads(line)["text"].split() for line in file]
        parts[part] = windows(part, [[words.setdefault(word, len(words) + 1) for word in row] for row in rows])
    found = overlap([parts["train"]], parts["heldout"])
    assert (found["documents"], found["exact"], found["near"]) == (55, 0, 0)
