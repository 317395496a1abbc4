"""The parts of `distill bench` that need no GPU: its arithmetic, its check, its refusals, its table."""

import json

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig

from distill.benchmarks import BENCHMARKS, benchmark, ops, steps
from distill.benchmarks.check import relative_errors
from distill.benchmarks.peers import PEERS
from distill.errors import UserError
from distill.recipe_file import load
from distill.shipped import shipped_folder
from students.kernels.op import all_ops
from tests.teachers.tiny import SMALL


def test_the_check_sees_a_wrong_gradient():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, d):
            return 2.1 * d

    errors = relative_errors(lambda x: Wrong.apply(x), lambda x: 2 * x, {"x": torch.randn(5)}, {})
    assert errors["output 0"] < 1e-6 and errors["gradient of x"] == pytest.approx(0.05, rel=1e-3)


def test_the_check_sees_nan_and_a_missing_gradient():
    errors = relative_errors(lambda x, y: x * float("nan"), lambda x, y: x + y, {"x": torch.ones(2), "y": torch.ones(2)}, {})
    assert errors["output 0"] == float("inf") and errors["gradient of y"] == pytest.approx(1)


def test_floors_are_those_worked_out_by_hand():
    """A scan of 8 x 2,048 tokens, 32 heads of 64, a group a head: 0.090 ms forward at 3.0 TB/s, 0.248 ms with backward."""
    scan, head = all_ops()["ssd"], all_ops()["linear_kl"]
    work = scan.work(scan.cases[0])
    assert work.forward[0] / 3.0e12 == pytest.approx(0.090e-3, rel=0.01)
    assert work.both[0] / 3.0e12 == pytest.approx(0.248e-3, rel=0.01)
    heads = head.work(head.cases[0])
    assert heads.both[1] / 800e12 == pytest.approx(8.2e-3, rel=0.01)


def test_peers_are_of_ops_that_are_timed():
    assert set(PEERS) <= set(all_ops())


def test_every_mode_is_a_module_of_one_shape():
    for mode in BENCHMARKS:
        assert all(callable(getattr(benchmark(mode), name)) for name in ("run", "table", "all_right"))
    with pytest.raises(UserError, match="there is no benchmark 'step'; did you mean 'steps'"):
        benchmark("step")


def test_bench_refuses(monkeypatch):
    with pytest.raises(UserError, match="no op 'sdd' to bench; did you mean 'ssd'"):
        ops.run(["sdd"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"on a GPU, and torch.cuda.is_available\(\) is False"):
        ops.run(["ssd"])


def test_the_table_has_times_shares_and_what_failed():
    times = {"forward": 0.2, "forward_graph": 0.15, "forward_share": 0.6, "both": None, "mib": 12.0, "error": 4e-3}
    rows = [
        {"op": "ssd", "case": "b8", "by": "triton"} | times,
        {"op": "ssd", "case": "b8", "by": "a peer", "failed": "RuntimeError: no"},
    ]
    result = {"gpu": "a GPU", "ceilings": {"bytes_per_second": 3e12, "flop_per_second": 8e14}, "rows": rows}
    console = Console(width=200, record=True)
    console.print(ops.table(result))
    text = console.export_text()
    assert "0.150" in text and "60%" in text and "RuntimeError: no" in text and "copy 3000 GB/s" in text
    assert ops.all_right(result)
    rows[1]["by"] = "triton"
    assert not ops.all_right(result)
    assert "share 60%" in ops.line(rows[0])


def test_steps_of_every_stage(tmp_path, monkeypatch, capsys):
    """Whole optimizer steps of a recipe on a tiny model of its teacher's family; on a CPU only the references run."""
    config = json.loads((shipped_folder() / "configs/smollm2-135m-instruct.json").read_text()) | SMALL
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    monkeypatch.setattr(steps, "teacher_config", lambda recipe: AutoConfig.from_pretrained(tmp_path / "tiny.json"))
    sets = [
        "pattern=AM",
        "device=cpu",
        "data.seq_len=32",
        "data.batch=2",
        "stages.orient.batch=2",
        "evaluation.passkey=[64]",
    ]
    result = steps.run(load("smollm2-135m_mamba2-hybrid", sets))
    assert [row["stage"] for row in result["rows"]] == ["orient", "align", "imitate"]
    assert all(row["tokens_per_second"] > 0 and row["kernels"] == "reference" for row in result["rows"])
    assert steps.all_right(result) and not steps.all_right({"rows": [{"stage": "align", "failed": "out of memory"}]})
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert steps.table(result).row_count == 3


def test_steps_take_a_teachers_shape_from_a_shipped_config_or_its_own():
    for name in ("smollm2-135m_mamba2-hybrid", "quickstart"):
        config = steps.teacher_config(load(name))
        assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 576, 30)
