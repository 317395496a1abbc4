"""Tables over documents: which windows are read, standard errors, pairs of rows, and text apart from that of selections."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import distill
from distill.build import build
from distill.errors import UserError
from distill.evaluation import judging
from distill.evaluation.fidelity import fidelity, perplexity
from distill.evaluation.knockouts import has_branches, knocked_out
from distill.evaluation.nonfinite import NotFinite
from distill.evaluation.pairing import mean_and_error, paired
from distill.evaluation.recall.families import FAMILIES, make
from distill.evaluation.recall.item import Tokens
from distill.evaluation.recall.wording import JUDGING, SELECTING
from distill.evaluation.suites import SUITES, suite_of_run
from distill.output_head import full_products, generating_wide, wide_head, wide_logits
from distill.recipe import EvaluationOptions
from distill.recipe_file import check
from distill.reports import headline_cells
from distill.runs.session import Session
from distill.runs.texts import _check_tokens
from distill.selection.layers import TaskOptions
from distill.selection.measures import Material
from distill.selection.options import Options
from distill.strict_json import dumps
from distill.text.by_document import DocumentWindows, selection_begins
from distill.text.heldout import Heldout
from distill.text.prepared import load
from distill.text.shards import SIZE
from distill.text.windows import Windows
from students.config import Layout
from tests.distill.prepared_folders import write

BRANCHED = {"M": {"mixer": "discrete_mamba2", "window": {"size": 4, "sinks": 2}}}


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


# knock-outs


def test_a_knockout_shares_weights_and_leaves_the_student_alone(teacher):
    student = build(teacher, Layout("AAMM", BRANCHED))[0]
    ids, documents = torch.randint(1, 320, (2, 24)), torch.zeros(2, 24, dtype=torch.long)
    whole = student.hidden(ids, documents)
    for state in (True, False):
        model = knocked_out(student, state)
        assert {p.data_ptr() for p in model.parameters()} == {p.data_ptr() for p in student.parameters()}
        assert [sorted(mixer.silenced) for mixer in model.mixers.values()] == [["ssm" if state else "window"]] * 2
        assert (model.hidden(ids, documents) - whole).norm() > 1e-3 * whole.norm()
    assert torch.equal(student.hidden(ids, documents), whole)
    for mixer in student.mixers.values():  # the same by hand
        mixer.window.o_proj.weight.data.zero_()
    torch.testing.assert_close(knocked_out(student, state=False).hidden(ids, documents), student.hidden(ids, documents))
    alone = build(teacher, Layout("AAMM", {"M": {"mixer": "mamba2"}}))[0]
    assert has_branches(student) and not has_branches(alone)


def test_a_mixer_of_one_branch_is_never_silenced(teacher):
    mixers = {"M": BRANCHED["M"], "S": {"mixer": "mamba2"}, "H": {"mixer": "split_heads", "keep": [0]}}
    model = knocked_out(build(teacher, Layout("ASMH", mixers))[0], state=True)
    assert [sorted(mixer.silenced) for mixer in model.mixers.values()] == [[], ["ssm"], ["ssm"]]


# what selections read


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


# numbers


def test_heads_are_judged_in_float32(teacher):
    """In bfloat16 two logits in one would be the largest; the body's precision is its own."""
    torch.manual_seed(5)
    hidden = torch.randn(400, 32).bfloat16()
    head = wide_head(teacher.model.bfloat16())
    assert head.weight.dtype == torch.float32
    wanted = hidden.double() @ head.weight.double().t()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = wide_logits(hidden, head)
        narrow = torch.nn.functional.linear(hidden.float(), head.weight)
        torch.set_float32_matmul_precision("high")
        with full_products(hidden.device):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
        torch.set_float32_matmul_precision("highest")
    assert found.dtype == torch.float32 and narrow.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)

    def tied(logits):
        return (logits == logits.max(-1, keepdim=True).values).sum(-1).gt(1).float().mean()

    assert tied(narrow) > 0.01 and tied(found) == 0
    ids = torch.randint(1, 320, (1, 9))
    with generating_wide(teacher.model), torch.no_grad():
        assert teacher.model(ids).logits.dtype == torch.float32
    assert teacher.model(ids).logits.dtype == torch.bfloat16


def test_scores_and_fidelity_use_the_wide_head(teacher, monkeypatch):
    from distill.evaluation.scoring import Marked, score

    session_batch = torch.randint(1, 320, (1, 33))
    ids, targets = session_batch[:, :-1], session_batch[:, 1:]
    zeros = torch.zeros_like(ids)
    from distill.text.windows import Batch

    batch = Batch(ids, zeros, torch.arange(32)[None], targets, torch.ones(1, 32), zeros)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        heldout = Heldout.of(teacher, [batch], ["text"])
        found = fidelity(teacher, None, heldout)
        ((answer,),) = score(teacher, None, [Marked(session_batch[0].tolist(), ((1, 33),))])
        hidden = teacher.hidden(ids, batch.positions)
    logits = hidden.float() @ teacher.model.get_output_embeddings().weight.t()
    nll = torch.nn.functional.cross_entropy(logits[0], targets[0])
    assert found["nll"] == pytest.approx(nll.item(), rel=1e-5) and answer.logprob == pytest.approx(
        -32 * nll.item(), rel=1e-5
    )


def test_a_student_that_is_not_finite_is_refused_by_layer(teacher, tiny_recipe):
    session = Session.open(check(tiny_recipe, "here"), trains=False)
    heldout, suite = session.heldout(64), suite_of_run(EvaluationOptions(passkey=[64], passkey_trials=1))
    sound, broken = (build(teacher, Layout("AAMM", BRANCHED))[0] for _ in range(2))
    broken.mixers[2].window.o_proj.weight.data = torch.full_like(broken.mixers[2].window.o_proj.weight, torch.inf)
    where = r"the student's first output that is not finite is that of layer 2 \(model\.layers\.2\.self_attn"
    with pytest.raises(NotFinite, match=f"^student, fidelity: {where}.*; there is nothing to compare"):
        judging.judge_all(
            teacher, {"teacher": lambda: None, "student": lambda: broken}, heldout, suite, {}, lambda what: None
        )
    rows = {"teacher": lambda: None, "student": lambda: sound, "twin": lambda: broken}
    results, _, dropped = judging.judge_all(teacher, rows, heldout, suite, {}, lambda what: None)
    assert list(results) == ["teacher", "student"]
    (entry,) = dropped
    assert entry["rows"] == ["twin"] and "that of layer 2" in entry["reason"]


def test_json_has_finite_numbers():
    assert json.loads(dumps({"a": [1.5, None]}, "here")) == {"a": [1.5, None]}
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match=rf"numbers\.json cannot hold rows\.twin\.1: it is {value}"):
            dumps({"rows": {"twin": (0.0, value)}}, "numbers.json")
    assert perplexity(2.0) == math.exp(2.0) and perplexity(800.0) is None


def test_a_file_is_kept_when_what_is_new_is_no_json(judged_run, tmp_path):
    from distill.runs.run_dir import RunDir

    folder = RunDir(tmp_path)
    folder.write("evaluations.json", {"final": {"target": "x"}})
    with pytest.raises(UserError, match=r"evaluations\.json cannot hold kl: it is nan"):
        folder.write("evaluations.json", {"kl": math.nan})
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot hold loss: it is inf"):
        folder.log(loss=math.inf)
    assert folder.read("evaluations.json") == {"final": {"target": "x"}} and folder.metrics() == []


def test_a_selection_refuses_to_rank_by_nan(tiny_recipe, tmp_path, monkeypatch):
    tiny_recipe["pattern"] = {"keep": 2, "by": "kl", "tokens": 64, "length": 128, "trials": 1, "families": ["passkey"]}
    measure = Material.measure
    monkeypatch.setattr(Material, "measure", lambda self, model, name: measure(self, model, name) | {"kl": math.nan})
    with pytest.raises(UserError, match=r"the selection measured \w+ of teacher, and kl is nan"):
        distill.select(check(tiny_recipe, "here"), runs=tmp_path)
