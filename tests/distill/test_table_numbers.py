"""Numbers of tables: ablations of a student's branches, heads in float32, and values that are not finite."""

import json
import math

import pytest
import torch

import distill
from distill.build import build
from distill.errors import UserError
from distill.evaluation import judging
from distill.evaluation.fidelity import fidelity, perplexity
from distill.evaluation.knockouts import has_branches, knocked_out
from distill.evaluation.nonfinite import NotFinite
from distill.evaluation.suites import suite_of_run
from distill.output_head import full_products, generating_wide, wide_head, wide_logits
from distill.recipe import EvaluationOptions
from distill.recipe_file import check
from distill.runs.session import Session
from distill.selection.measures import Material
from distill.strict_json import dumps
from distill.text.heldout import Heldout
from students.config import Layout

BRANCHED = {"M": {"mixer": "discrete_mamba2", "window": {"size": 4, "sinks": 2}}}


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
