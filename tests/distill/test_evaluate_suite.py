"""A whole suite on a tiny student: its JSON, its tables, and its measurements of speed."""

import io
import json
import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers.cache_utils import DynamicCache

import distill
from distill.build import build
from distill.evaluation import judging, speed, suites
from distill.evaluation.evaluation import Evaluation
from distill.evaluation.rows import rows_table
from distill.evaluation.speed_table import speed_table
from distill.evaluation.table import overlap_line, show
from students.compat import CACHE
from students.config import Layout

MIXERS = {"M": {"mixer": "discrete_mamba2", "window": {"size": 4, "sinks": 2}}}


@pytest.fixture
def student(teacher):
    return build(teacher, Layout("AAMM", MIXERS))[0]


@pytest.fixture
def checkpoint(teacher, student, tmp_path):
    """The student's folder, as a run leaves it."""
    student.config.distill["teacher"] = {"reference": teacher.reference, "fingerprint": teacher.fingerprint}
    student.save_pretrained(tmp_path / "student")
    teacher.tokenizer.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def task_folder(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("piqa", "hellaswag"):
        items = [{"ctx": f"{name} {n}", "choices": [f"{n} a", f"b {n} c"], "label": n % 2} for n in range(6)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    words = [{"ctx": f"the {n}", "choices": ["and"], "label": 0} for n in range(4)]
    (folder / "lambada.jsonl").write_text("".join(json.dumps(item) + "\n" for item in words))
    return folder


def printed(judged):
    page = io.StringIO()
    show(judged, Console(file=page, width=80))
    return page.getvalue()


def test_every_evaluation_of_a_suite(checkpoint, text_files, task_folder, monkeypatch):
    small = replace(
        suites.SUITES["standard"],
        passkey=(64, 128, 1024),
        passkey_trials=2,
        recall=(256, 1024),
        recall_trials=1,
        depths=(0.0, 1.0),
        speed=(32, 64, 2048),
    )
    monkeypatch.setitem(suites.SUITES, "standard", small)
    options = {"heldout": str(text_files / "heldout.jsonl"), "suite": "standard", "tasks": task_folder}
    judged = distill.evaluate(checkpoint, **options)
    baselines = ["window_layout", "uniform_window", "window_everywhere"]
    assert list(judged["rows"]) == ["teacher", "student", "no_state", "no_window", *baselines]
    assert set(judged["rows"]["no_state"]) == {"fidelity", "passkey", "recall"}
    teacher, student = judged["rows"]["teacher"], judged["rows"]["student"]
    assert set(student) == set(suites.SUITES["standard"].evaluations) >= {"fidelity", "passkey", "recall", "tasks", "speed"}
    assert set(judged["rows"]["window_layout"]) == {"fidelity", "passkey", "recall", "tasks"}
    assert [cell["length"] for cell in student["passkey"]] == [64, 128]
    assert len(student["recall"]["needle"]) == 2 and student["recall"].keys() == teacher["recall"].keys()
    assert teacher["fidelity"]["rank"] == 1.0 and teacher["fidelity"]["ece"] == teacher["fidelity"]["teacher_ece"]
    assert student["fidelity"]["teacher_ece"] == teacher["fidelity"]["ece"]
    assert judged["chance"] == {"piqa": 0.5, "hellaswag": 0.5, "lambada": 0.0}
    beside = judged["against_teacher"]["student"]
    assert beside["tasks"]["piqa"]["win_or_tie"] >= 0.0 and beside["recovery"]["tasks"] == ["piqa", "hellaswag", "lambada"]
    reasons = {(entry["evaluation"], entry["part"]): entry["reason"] for entry in judged["not_run"]}
    assert "positions for 512" in reasons["passkey", "1024"] and "positions for 512" in reasons["recall", "1024"]
    assert "no winogrande.jsonl" in reasons["tasks", "winogrande"]
    assert "a CPU is timed only up to" in reasons["speed", "length 2048, batch 1"]
    assert ("speed", "") in reasons  # of the baselines
    assert json.loads(json.dumps(judged)) == judged
    again = distill.evaluate(checkpoint, **options)
    assert _without_speed(again["rows"]) == _without_speed(judged["rows"])
    page = printed(judged)
    assert max(len(line) for line in page.splitlines()) <= 80
    for part in (
        "same layers",
        "even layers",
        "all layers",
        "chance",
        "win or tie",
        "recall at 256",
        "recovery",
        "not run: tasks",
    ):
        assert part in page, part


def _without_speed(rows):
    return {row: {name: found for name, found in results.items() if name != "speed"} for row, results in rows.items()}


def test_quick_says_what_it_leaves_out(checkpoint, text_files, monkeypatch):
    monkeypatch.delenv("DISTILL_TASKS", raising=False)
    monkeypatch.setitem(suites.SUITES, "quick", replace(suites.SUITES["quick"], passkey=(64,)))
    judged = distill.evaluate(checkpoint, heldout=str(text_files / "heldout.jsonl"))
    assert judged["overlap"] is None and "it is not known whether" in overlap_line(
        judged
    )  # what it was trained on, nobody says
    assert judged["suite"] == "quick" and judged["chance"] == {}
    assert judged["against_teacher"]["student"]["recovery"]["score"] is None
    page = printed(judged)
    assert "no task files" in page and "the quick suite leaves it out for this row" in " ".join(page.split())


class Words(Evaluation):
    """How many tokens the held-out text has; what an evaluation that was just added looks like."""

    suites, baselines = ("quick",), ()

    def measure(self, teacher, model, heldout, suite):
        return {"tokens": sum(batch.tokens for batch in heldout.batches)}

    def beside(self, own, teacher):
        return {"words": {"more": own["tokens"] - teacher["tokens"]}}

    def left_out(self, results):
        yield "rare words", "nobody asked"

    def tables(self, judged):
        yield "words read", rows_table(["", "words"], {"student": [str(judged["rows"]["student"]["words"]["tokens"])]})


def test_an_evaluation_is_a_class_and_a_line(judged_run, tmp_path, monkeypatch):
    """Its results, what stands beside the teacher's, what is left out, its table and its section of the report."""
    folder = tmp_path / "run"
    shutil.copytree(judged_run, folder)
    monkeypatch.setitem(suites.EVALUATIONS, "words", f"{__name__}:Words")
    monkeypatch.setitem(suites.SUITES, "quick", suites._filled(replace(suites.SUITES["quick"], passkey=(64,), tasks=())))
    judged = distill.evaluate(folder)
    assert set(judged["rows"]["student"]) >= {"words"} and "words" not in judged["rows"]["window_everywhere"]
    assert judged["against_teacher"]["student"]["words"] == {"more": 0}
    left_out = {"rows": ["teacher", "student"], "evaluation": "words", "part": "rare words", "reason": "nobody asked"}
    assert left_out in judged["not_run"]
    assert "words read" in printed(judged) and "<h2>Words</h2>" in (folder / "report.html").read_text()


def test_speed_of_teacher_and_student(teacher, student):
    suite = replace(suites.SUITES["full"], speed=(32, 64), batches=(1, 2))
    own, other = speed.row(teacher, student, None, suite), speed.row(teacher, None, None, suite)
    assert [(cell["length"], cell["batch"]) for cell in own["cells"]] == [(32, 1), (64, 1), (32, 2), (64, 2)]
    for cell in own["cells"] + other["cells"]:
        assert 0 < cell["prefill_seconds"] < cell["first_token_seconds"] and cell["decode_tokens_per_second"] > 0
    for cell in other["cells"]:  # keys and values of 4 layers, 2 key heads of 8 channels, float32
        tokens = cell["length"] + speed.DECODE_STEPS["cpu"]
        assert cell["cache_bytes"] == 4 * 2 * 2 * 8 * 4 * tokens * cell["batch"]
    grown = [found["cells"][1]["cache_bytes"] - found["cells"][0]["cache_bytes"] for found in (own, other)]
    assert grown[0] == grown[1] // 2  # a mixer's state does not grow


def test_speed_in_place(teacher, student, monkeypatch):
    """What a GPU measures as graphs, run as it is; the table has a column for it, and says where there is none."""
    monkeypatch.setattr(speed, "_cell", _with_graphs(speed._cell))
    suite = replace(suites.SUITES["full"], speed=(32, 64), batches=(1,))
    rows = {
        row: {"speed": speed.row(teacher, model, None, suite)} for row, model in (("teacher", None), ("student", student))
    }
    assert all(cell["graph_decode_tokens_per_second"] > 0 for cell in rows["student"]["speed"]["cells"])
    del rows["teacher"]["speed"]["cells"][1]["graph_decode_tokens_per_second"]
    rows["teacher"]["speed"]["cells"][1]["graph_not_run"] = "it waits"
    judged = {"rows": rows, "against_teacher": judging.against_teacher(rows)}
    assert set(judged["against_teacher"]["student"]["speed"][0]) == {"batch", "first_token", "decode", "graph_decode"}
    console = Console(width=80, record=True)
    console.print(speed_table(judged))
    page = console.export_text()
    assert "tok/s eager" in page and "tok/s graph" in page and " | -" in page
    assert judging.not_run(rows, replace(suite, evaluations=())) == [
        {"rows": ["teacher"], "evaluation": "speed", "part": "length 64, batch 1, as CUDA graphs", "reason": "it waits"}
    ]


def _with_graphs(cell):
    def both(model, length, batch):
        ids = torch.randint(1, 96, (batch, length))
        cache = model.new_cache() if hasattr(model, "new_cache") else DynamicCache(config=model.config)
        speed._through(model)(ids, cache)
        return cell(model, length, batch) | speed.graph_rate(model, cache, ids[:, -1:], 3)

    return both


def test_speed_of_shared_keys_and_meta_tokens(teacher):
    heads = {"mixer": "parallel_heads", "window": 8, "sinks": 2}
    layout = Layout("PSPS", {"P": heads, "S": heads | {"share_kv": True}}, 2)
    student, _ = build(teacher, layout)
    cells = speed.row(teacher, student, None, replace(suites.SUITES["full"], speed=(32,), batches=(2,)))["cells"]
    assert cells[0]["decode_tokens_per_second"] > 0 and cells[0]["cache_bytes"] > 0


def test_what_speed_cannot_measure(teacher, student, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(speed, "_measure", full)
    suite = replace(suites.SUITES["full"], speed=(32, 4096), batches=(1,))
    cells = speed.row(teacher, student, None, suite)["cells"]
    assert [cell["not_run"] for cell in cells] == ["out of memory", "a CPU is timed only up to 1024 tokens"]


@torch.no_grad()
def test_bfloat16_copies_keep_what_must_be_wide(student):
    timed = speed.in_bfloat16(student)
    assert speed._measure(timed, 32, 2)["cache_bytes"] < speed._measure(student, 32, 2)["cache_bytes"]
    types = {name.split(".")[-1]: parameter.dtype for name, parameter in timed.named_parameters()}
    assert types["weight"] == torch.bfloat16 and types["scale"] == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    assert all(buffer.dtype != torch.bfloat16 for buffer in timed.buffers())


def test_cache_bytes_counts_tensors_once(teacher):
    cache = DynamicCache(config=teacher.config)
    teacher.model(torch.ones(1, 5, dtype=torch.long), **{CACHE: cache})
    assert speed.held_bytes(cache) == 4 * 2 * 2 * 8 * 5 * 4
