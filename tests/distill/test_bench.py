"""What of `distill bench` does not need a GPU: its arithmetic, its check, its refusals, its table."""

import json

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig

from distill import bench
from distill.bench import steps
from distill.bench.check import relative_errors
from distill.bench.ops import OPS
from distill.bench.peers import PEERS
from distill.errors import UserError
from distill.recipe import load, shipped_folder
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
    work = OPS["ssd"].work(OPS["ssd"].cases[0])
    assert work.forward[0] / 3.0e12 == pytest.approx(0.090e-3, rel=0.01)
    assert work.both[0] / 3.0e12 == pytest.approx(0.248e-3, rel=0.01)
    heads = OPS["linear_kl"].work(OPS["linear_kl"].cases[0])
    assert heads.both[1] / 800e12 == pytest.approx(8.2e-3, rel=0.01)


@pytest.mark.parametrize("name", OPS)
def test_every_op_draws_its_smallest_case_and_its_reference_takes_it(name):
    op = OPS[name]
    case = op.small(op.cases[0])
    case = case._replace(
        **{field: size for field, size in (("t", 20), ("v", 30), ("d", 8), ("e", 8), ("c", 64)) if hasattr(case, field)}
    )
    leaves, fixed = op.draw(case, torch.float32, "cpu")
    outputs = op.adapted(op.reference)(**leaves, **fixed)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    assert torch.isfinite(first).all() and op.configs(case, torch.bfloat16) and callable(op.kernel())
    assert set(PEERS) <= set(OPS)


def test_bench_refuses(monkeypatch):
    with pytest.raises(UserError, match="no op 'sdd' to bench; did you mean 'ssd'"):
        bench.run(["sdd"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"on a GPU, and torch.cuda.is_available\(\) is False"):
        bench.run(["ssd"])


def test_the_table_has_times_shares_and_what_failed():
    times = {"forward": 0.2, "forward_graph": 0.15, "forward_share": 0.6, "both": None, "mib": 12.0, "error": 4e-3}
    rows = [
        {"op": "ssd", "case": "b8", "by": "triton"} | times,
        {"op": "ssd", "case": "b8", "by": "a peer", "failed": "RuntimeError: no"},
    ]
    result = {"gpu": "a GPU", "ceilings": {"bytes_per_second": 3e12, "flop_per_second": 8e14}, "rows": rows}
    console = Console(width=200, record=True)
    console.print(bench.table(result))
    text = console.export_text()
    assert "0.150" in text and "60%" in text and "RuntimeError: no" in text and "copy 3000 GB/s" in text
    assert bench.all_right(result)
    rows[1]["by"] = "triton"
    assert not bench.all_right(result)
    assert "share 60%" in bench.line(rows[0])


def test_steps_of_every_stage(tmp_path, monkeypatch, capsys):
    """Whole optimizer steps of a recipe on a tiny model of its teacher's family; on a CPU only the references run."""
    config = json.loads((shipped_folder() / "configs/smollm2-135m-instruct.json").read_text()) | SMALL
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    monkeypatch.setattr(steps, "teacher_config", lambda recipe: AutoConfig.from_pretrained(tmp_path / "tiny.json"))
    sets = ["pattern=AM", "device=cpu", "data.seq_len=32", "data.batch=2", "stages.orient.batch=2"]
    result = steps.run("smollm2-135m_mamba2-hybrid", sets)
    assert [row["stage"] for row in result["rows"]] == ["orient", "align", "imitate"]
    assert all(row["tokens_per_second"] > 0 and row["kernels"] == "reference" for row in result["rows"])
    assert steps.all_right(result) and not steps.all_right({"rows": [{"stage": "align", "failed": "out of memory"}]})
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert steps.table(result).row_count == 3


def test_steps_take_a_teachers_shape_from_a_shipped_config_or_its_own():
    for name in ("smollm2-135m_mamba2-hybrid", "quickstart"):
        config = steps.teacher_config(load(name))
        assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 576, 30)
