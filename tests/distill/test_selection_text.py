"""Selections read other words and other text than tables, and a table says which of its numbers selected the layout."""

from dataclasses import replace

import numpy as np
import pytest

import distill
from distill.errors import UserError
from distill.evaluation.recall.families import FAMILIES, make
from distill.evaluation.recall.item import Tokens
from distill.evaluation.recall.wording import JUDGING, SELECTING
from distill.evaluation.suites import SUITES
from distill.recipe_file import check
from distill.reports import headline_cells
from distill.runs.session import Session
from distill.selection.layers import TaskOptions
from distill.selection.measures import Material
from distill.selection.options import Options
from distill.text.by_document import selection_begins


@pytest.mark.parametrize("family", FAMILIES)
def test_selections_and_tables_share_no_words(teacher, family):
    """No run of 24 tokens, a line of text, is in both, at any length and depth."""

    def runs(words, seed):
        texts = [
            text for length in (256, 400) for text in make(Tokens(teacher.tokenizer, words), family, length, 3, seed=seed)
        ]
        return {tuple(text.ids[place : place + 24]) for text in texts for place in range(len(text.ids) - 23)}

    judging, selecting = runs(JUDGING, 0), runs(SELECTING, -1)
    assert judging and selecting and not judging & selecting
    if family == "passkey":  # what two keys of one wording share
        assert len(judging & runs(JUDGING, 1)) > 50


def test_random_words_are_dealt_out(tokenizer, monkeypatch):
    monkeypatch.setattr("distill.evaluation.recall.item._is_word", lambda text: True)
    monkeypatch.setattr("distill.evaluation.recall.item.PLAIN_POOL", 16)
    one, other = (set(Tokens(tokenizer, words).pool) for words in (JUDGING, SELECTING))
    assert one and other and not one & other


def test_selections_and_tables_share_no_text(tiny_recipe):
    tiny_recipe["pattern"] = {"keep": 2, "by": "kl"}
    tiny_recipe["evaluation"] |= {"final_tokens": 10**6}
    session = Session.open(check(tiny_recipe, "here"), trains=False)
    material = Material(session, Options(keep=2, by="kl", tokens=10**6))
    border = selection_begins(session.heldout_windows.prepared)
    tokens = np.load(session.heldout_windows.folder / "00000" / "tokens.npy")
    for heldout, part in ((session.heldout(10**6), tokens[:border]), (material.heldout, tokens[border:])):
        read = [batch.ids[batch.weights.bool()] for batch in heldout.batches]
        text = " ".join(map(str, part.tolist()))
        assert sum(map(len, read)) > 100 and all(" ".join(map(str, one.tolist()[:20])) in text for one in read)
    assert not set(session.heldout(10**6).documents[0].unique().tolist()) & set(
        material.heldout.documents[0].unique().tolist()
    )
    recipe = tiny_recipe | {"data": tiny_recipe["data"] | {"seq_len": 480}, "evaluation": {"passkey": [64]}}
    short = Session.open(check(recipe, "here"), trains=False)
    short.heldout_windows.count = 1
    with pytest.raises(UserError, match=r"one window of 480, but a selection needs text that its student is not"):
        short.selection_text(256)


def test_measurements_on_other_words_are_not_mixed(tmp_path):
    from distill.runs.run_dir import RunDir
    from distill.selection.measurer import MATERIAL, Records

    old = {"facts": {"teacher": "t"}, "measured": {"layer 1": {"kl": {"kl": 1.0, "tokens": 8, "seconds": 0.1}}}}
    RunDir(tmp_path).write("selection.json", old)
    with pytest.raises(UserError, match="the material is not the one that was measured there"):
        Records(RunDir(tmp_path), {"teacher": "t", MATERIAL: "now"}, writes=False)
    model = {"recalled": 1.0, "choice": 1.0, "kl": 0.1, "agreement": 0.9, "passkey": 1.0}
    cost = {"tokens": 8, "seconds": 0.1, "predicted_seconds": 0.1}
    chosen = {
        "by": "kl",
        "options": {},
        "pattern": "A",
        "mixers": {},
        "layers": [0],
        "heads": None,
        "ranking": [],
        "note": "",
    }
    chosen |= {"models": {"teacher": model, "chosen": model, "even": model}, "cost": cost}
    RunDir(tmp_path).write("selection.json", {**old, "chosen": chosen})
    assert Records(RunDir(tmp_path), {"teacher": "t", MATERIAL: "now"}, writes=False).content["chosen"] == chosen


def test_what_selected_a_layout_is_in_sample(tiny_recipe, tmp_path, monkeypatch):
    small = {"window": 8, "sinks": 1, "length": 128, "trials": 1, "tokens": 128, "families": ["passkey", "induction"]}
    tiny_recipe["stages"] = [{"initialise": {"tokens": 128}}]
    tiny_recipe["mixers"] = {"M": {"mixer": "discrete_mamba2"}}
    folder = distill.run(check(tiny_recipe | {"pattern": {"keep": 2, "by": "recall", **small}}, "here"), runs=tmp_path)
    judged = folder.read("evaluations.json")["final"]
    assert judged["in_sample"] == {"families": ["passkey", "induction"], "tasks": []}
    assert not any(column.startswith("passkey") for column in headline_cells(judged)[0])
    text = (folder.path / "report.md").read_text()
    assert "In-sample: passkey, induct. selected the layout" in text and "passkey 64" not in text
    assert "in-sample: passkeys selected the layout" in (folder.path / "report.html").read_text()
    few = replace(SUITES["quick"], evaluations=("fidelity",), baselines=(), knockouts=(), window=32)
    monkeypatch.setitem(SUITES, "quick", few)
    alone = distill.evaluate(
        folder.student, heldout=tiny_recipe["data"]["heldout"][0]["path"]
    )  # the student knows it itself
    assert alone["in_sample"]["families"] == ["passkey", "induction"]


def test_what_a_scorer_selects_by():
    from distill.selection.gates import GateOptions, Gates
    from distill.selection.layers import DivergenceScorer, RecallScorer, TaskScorer, UniformScorer

    families = ["key_value", "passkey"]
    for scorer, options, wanted in (
        (RecallScorer, Options(keep=2, by="recall"), (families, [])),
        (DivergenceScorer, Options(keep=2, by="kl"), ([], [])),
        (UniformScorer, Options(keep=2, by="uniform"), ([], [])),
        (TaskScorer, TaskOptions(keep=2, by="task", tasks="x", names=["piqa"]), ([], ["piqa"])),
        (Gates, GateOptions(keep=2, by="gates"), (families, [])),
        (Gates, GateOptions(keep=2, by="gates", retrieval=0.0), ([], [])),
    ):
        selected = scorer.selected_by(options)
        assert (selected.families, selected.tasks) == wanted
