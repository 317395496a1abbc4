"""Contracts of every stage, export target and evaluation in the tables, including those that are added later."""

import inspect
import json

import pytest

import distill
from distill.errors import UserError
from distill.evaluation.suites import EVALUATIONS, SIZES, evaluation
from distill.exporters import EXPORTERS, target
from distill.exporters.place import MARKER
from distill.exporters.source import Source
from distill.recipe_file import check
from distill.stages import STAGES, stage_class
from distill.stages.stage import Stage


@pytest.mark.parametrize("name", STAGES)
def test_a_stage(name, tiny_recipe, tmp_path):
    """It says what it is, takes its steps, is probed and finishes."""
    kind = stage_class(name)
    assert issubclass(kind, Stage) and kind.__doc__ and kind.Options.__doc__
    assert not kind.probed or kind.probe_options().tokens, "what is probed is made without a recipe"
    assert kind.layer_loss is None or kind.probed, "what is shown layer by layer is measured on the probe"
    options = {"tokens": 128, **({"lr": 1e-3} if kind.trains else {})}
    if kind.text == "pairs":
        pairs = [{"prompt": "it is", "chosen": f" {number}", "rejected": f" not {number}"} for number in range(6)]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        options["data"] = [{"path": str(tmp_path / "pairs.jsonl")}]
    tiny_recipe["stages"] = [*([] if kind.first else tiny_recipe["stages"][:1]), {name: options}]
    folder = distill.run(check(tiny_recipe, "here"), runs=tmp_path)
    after = folder.read("evaluations.json")["after"]
    assert list(after)[-1].endswith(f"-{name}")
    assert not kind.probed or name in list(after.values())[-1]["probe"]
    assert bool({line["stage"] for line in folder.metrics()} & {name}) == kind.trains
    transfers = folder.read("transfer.json")
    assert transfers["sources"]  # the stage that comes first records


def test_one_stage_judges_layers():
    judged = [kind for name in STAGES if (kind := stage_class(name)).layer_loss and kind.layer_loss.judged]
    assert len(judged) == 1, "a judgement has one error a layer"


@pytest.mark.parametrize("name", EXPORTERS)
def test_an_export_target(name, judged_run, tmp_path):
    """It says what it makes, holds a plain student, and leaves one whole folder with its marker."""
    made = target(name)
    assert made.line and "\n" not in made.line
    reason = made.refuses(Source.read(judged_run / "student"))
    assert reason is None or len(reason) > 10
    if reason is None:
        out = distill.export(judged_run, to=name, out=tmp_path / "out", verify=False)
        marked = json.loads((out / MARKER).read_text())
        assert marked["target"] == name and "README.md" in marked["files"] and len(marked["files"]) > 1
    else:
        with pytest.raises(UserError, match=f"{name} cannot hold the student in .*--to portable"):
            distill.export(judged_run, to=name, out=tmp_path / "out")
    assert not list(tmp_path.glob(".*")), "a half-written folder was left"


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation(name, judged_run):
    """It names suites that exist, and shows and compares what it measured."""
    one = evaluation(name)
    suites = {suite.name for suite in SIZES} | {"run"}
    assert one.suites and set(one.baselines) <= set(one.suites) <= suites
    assert inspect.signature(one.measure).parameters.keys() == {"teacher", "model", "heldout", "suite"}
    judged = json.loads((judged_run / "evaluations.json").read_text())["suites"]["standard"]
    if "standard" in one.suites:
        rows = judged["rows"]
        assert all(title and table.row_count for title, table in one.tables(judged))
        assert isinstance(one.beside(rows["student"][name], rows["teacher"][name]), dict)
