"""Tables over documents: which windows are read, standard errors, and pairs of rows."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distill.errors import UserError
from distill.evaluation import judging
from distill.evaluation.fidelity import fidelity
from distill.evaluation.pairing import mean_and_error, paired
from distill.evaluation.suites import SUITES, suite_of_run
from distill.recipe import EvaluationOptions
from distill.recipe_file import check
from distill.reports import headline_cells
from distill.runs.session import Session
from distill.runs.texts import _check_tokens
from distill.text.by_document import DocumentWindows, selection_begins
from distill.text.prepared import load
from distill.text.shards import SIZE
from distill.text.windows import Windows
from tests.distill.prepared_folders import write


def prepared(folder, lengths, labels=None, size=SIZE):
    """A prepared text of documents of these lengths; every token is its own place."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    labels = labels or [0] * len(lengths)
    names = [str(number) for number in range(max(labels) + 1)]
    write(folder, np.arange(sum(lengths), dtype=np.uint16), np.cumsum([0, *lengths])[:-1], labels, names, size)
    return load(folder)


# windows


def test_each_window_begins_with_another_document(tmp_path):
    windows = DocumentWindows(prepared(tmp_path, [20, 9, 1, 30, 4], [0, 1, 0, 1, 0]), 8)
    ((batch, documents),) = windows.batches(4 * 8, 4)
    assert batch.ids[:, 0].tolist() == [0, 20, 30, 60]  # the third document has nothing to score, the last one is short
    assert documents[:3, 0].tolist() == [0, 1, 3] and batch.labels[:3, 0].tolist() == [0, 1, 1]
    assert torch.equal(batch.targets[:3], batch.ids[:3] + 1) and batch.weights[:3].all()
    assert documents[3].tolist() == [4, 4, 4, 4, -1, -1, -1, -1] and batch.weights[3].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert batch.positions[3, :4].tolist() == [0, 1, 2, 3] and batch.documents[3].tolist() == [0] * 4 + [1] * 4


def test_the_whole_text_is_read_once(tmp_path):
    lengths = [20, 9, 1, 30, 4, 5, 2]
    seen = []
    for batch, documents in DocumentWindows(prepared(tmp_path, lengths), 8).batches(10_000, 3):
        counts = batch.weights.bool()
        seen += list(zip(documents[counts].tolist(), batch.ids[counts].tolist(), strict=True))
        assert torch.equal(batch.targets[counts], batch.ids[counts] + 1)
    ends = np.cumsum(lengths)
    wanted = [(number, token) for number, end in enumerate(ends) for token in range(end - lengths[number], end - 1)]
    assert sorted(seen) == sorted(wanted)


def test_a_part_ends_where_it_says(tmp_path):
    folder = prepared(tmp_path, [20, 20, 20, 20])
    assert selection_begins(folder) == 60
    first = [batch for batch, _ in DocumentWindows(folder, 8, last=50).batches(1000, 1)]
    assert max(int(batch.targets[batch.weights.bool()].max()) for batch in first) == 49
    second = [batch for batch, _ in DocumentWindows(folder, 8, first=50).batches(1000, 1)]
    assert min(int(batch.ids.min()) for batch in second) == 50
    assert selection_begins(prepared(tmp_path, [100])) == 75  # one document is cut
    assert selection_begins(prepared(tmp_path, [60, 40])) == 60 and selection_begins(prepared(tmp_path, [95, 5])) == 75


def test_text_without_a_token_to_score_is_refused(tmp_path, tiny_recipe):
    with pytest.raises(UserError, match="no token to score among 3: each of its documents is one token long"):
        list(DocumentWindows(prepared(tmp_path, [1, 1, 1]), 8).batches(8, 1))
    many = SimpleNamespace(get_vocab=lambda: {"last": 3})
    for name, starts in (("scored", [0, 1, 3]), ("single", [0, 1, 2]), ("beyond", [0, 1, 3])):
        (tmp_path / name).mkdir()
        tokens = np.arange(starts[-1] + 1, dtype=np.uint16) + (name == "beyond")
        write(tmp_path / name, tokens, np.asarray(starts), [0, 0, 0], ["one"])
    _check_tokens(Windows(tmp_path / "scored", 2, None), many, "data.train")
    with pytest.raises(UserError, match=r"data\.train: no token of this text can be scored: each of its 3 documents"):
        _check_tokens(Windows(tmp_path / "single", 2, None), many, "data.train")
    with pytest.raises(UserError, match="has a token 4, but the tokenizer's last one is 3"):
        _check_tokens(Windows(tmp_path / "beyond", 2, None), many, "data.train")
    (tmp_path / "ends.jsonl").write_text('{"text": "<end>"}\n' * 400)  # nothing but ends of documents
    for part in ("train", "heldout"):
        data = {**tiny_recipe["data"], part: [{"path": str(tmp_path / "ends.jsonl")}]}
        with pytest.raises(UserError, match=rf"data\.{part}: there is no text in .*ends\.jsonl"):
            Session.open(check(tiny_recipe | {"data": data}, "here"))


def test_tables_read_so_many_documents():
    run = suite_of_run(EvaluationOptions(tokens=4096))
    assert run.text(EvaluationOptions(tokens=4096), 512) == (32 * 512, 512)
    assert run.text(EvaluationOptions(tokens=4096, final_tokens=131_072), 2048) == (131_072, 2048)
    assert run.text(EvaluationOptions(tokens=512, documents=4), 512) == (4 * 512, 512)
    assert SUITES["quick"].text(EvaluationOptions(tokens=65_536), 2048) == (32 * 256, 256)
    assert SUITES["full"].text(EvaluationOptions(), 512)[0] == 2**20


def test_a_session_judges_by_document(tiny_recipe):
    session = Session.open(check(tiny_recipe, "here"), trains=False)
    found = fidelity(session.teacher, None, session.heldout(256))
    documents = found["documents"]
    starts = np.load(session.heldout_windows.folder / "00000" / "starts.npy")
    before = (starts < selection_begins(session.heldout_windows.prepared)).sum()
    assert documents["number"] == list(range(before)) and sum(documents["tokens"]) == found["tokens"]
    assert found["nll"] == pytest.approx(np.average(documents["nll"], weights=documents["tokens"]))
    assert found["kl"] == 0.0 and found["agreement"] == 1.0


# errors and pairs


def test_the_error_is_that_of_documents():
    mean, error = mean_and_error([1.0, 3.0, 2.0, 2.0], [10, 10, 10, 10])
    assert mean == 2.0 and error == pytest.approx(np.std([1, 3, 2, 2], ddof=1) / 2)
    mean, error = mean_and_error([1.0, 4.0], [30, 10])  # of a ratio: each document weighs what its tokens do
    assert mean == 1.75 and error == pytest.approx(math.sqrt(2 * ((30 * 0.75) ** 2 + (10 * 2.25) ** 2)) / 40)
    assert mean_and_error([5.0], [7]) == (5.0, None)


def test_a_pair_is_judged_document_by_document():
    def measured(kl, number=(0, 1, 2)):
        ones = [1.0] * len(kl)
        return {"documents": {"number": list(number), "tokens": [4] * len(kl), "kl": kl, "nll": ones, "agreement": ones}}

    easy, hard = measured([0.1, 1.0, 5.0]), measured([0.3, 1.1, 5.3])
    found = paired(easy, hard)
    assert found["kl"]["difference"] == pytest.approx(-0.2) and found["kl"]["lower"] == found["kl"]["documents"] == 3
    assert found["kl"]["error"] == pytest.approx(0.1 / 3**0.5) and found["nll"]["difference"] == 0.0
    assert paired(easy, measured([0.3, 1.1, 5.3], (0, 1, 4))) == {} and paired(easy, {"kl": 1.0}) == {}
    cells = headline_cells(judged_of({"student": easy, "twin": hard}))[1]
    assert cells["twin"][2:4] == ["-0.200 ± 0.058", "3 of 3"] and cells["student"][2:4] == ["", ""]


def judged_of(rows, **further):
    numbers = {"kl": 1.0, "kl_error": 0.5, "agreement": 0.5, "perplexity": None, "tokens": 12}
    cells = [{"length": 64, "recalled": 1, "trials": 2}]
    filled = {
        row: {"fidelity": {**numbers, **results}, "passkey": cells} for row, results in {"teacher": {}, **rows}.items()
    }
    return {"rows": filled, "against_student": judging.against_student(filled), **further}


def test_run_and_report_have_pairs_and_knockouts(judged_run):
    evaluations = json.loads((judged_run / "evaluations.json").read_text())
    for judged in (evaluations["final"], evaluations["suites"]["standard"]):
        against = judged["against_student"]
        assert set(against) == set(judged["rows"]) - {"student"} and {"no_state", "no_window"} <= set(against)
        rows = {row: results["fidelity"] for row, results in judged["rows"].items()}
        for row, found in against.items():
            assert found["kl"]["difference"] == pytest.approx(rows["student"]["kl"] - rows[row]["kl"], abs=1e-9)
            assert found["kl"]["documents"] == len(rows[row]["documents"]["number"]) > 1
    page, text = (judged_run / "report.html").read_text(), (judged_run / "report.md").read_text()
    found = evaluations["final"]["against_student"]["no_state"]["kl"]
    cell = f"{found['difference']:+.3f} ± {found['error']:.3f}"
    for shown in (page, text):
        assert cell in shown and "ablation: states set to zero" in shown and "Student lower on: the number" in shown
        assert f"{found['lower']} of {found['documents']}" in shown
