"""`distill bench generation` on a tiny model of a family: its measurements, its limit, and models that do not fit."""

import json
import re

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

import distill
from distill.benchmarks import generation, named_recipes
from distill.benchmarks.sizes import sizes_of
from distill.build import count_parameters
from distill.cli import app
from distill.errors import UserError
from distill.planning import make_plan
from distill.recipe_file import load
from distill.shipped import shipped_folder
from students.state_size import limit, weight_bytes
from tests.teachers.tiny import SMALL, tiny_model

OVERRIDES = ["pattern=AM", "device=cpu"]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    config = json.loads((shipped_folder() / "configs/smollm2-135m-instruct.json").read_text()) | SMALL
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    monkeypatch.setattr(generation, "teacher_config", lambda recipe: AutoConfig.from_pretrained(tmp_path / "tiny.json"))


def test_a_table_of_several_students(tiny, capsys):
    variants = ["windows: mixers.M={mixer: discrete_mamba2, window: {size: 16, sinks: 2}}", "pattern=M"]
    options = {"variants": variants, "lengths": "24,0.5k".replace("0.5k", "40"), "batches": [1, 3]}
    result = distill.bench("generation", overrides=OVERRIDES, **options)
    rows = {row["model"]: row for row in result["rows"]}
    assert list(rows) == ["teacher", "smollm2-135m_mamba2-hybrid", "windows", "pattern=M"]
    assert [rows[name]["pattern"] for name in rows] == [None, "AM", "AM", "MM"]
    for row in rows.values():
        assert [(cell["length"], cell["batch"]) for cell in row["cells"]] == [(24, 1), (40, 1), (24, 3), (40, 3)]
        for cell in row["cells"]:
            assert cell["eager"] > 0 and cell["share"] == pytest.approx(cell["eager"] / cell["limit"])
            assert cell["with_prompts"] < cell["eager"]
        one, three = row["cells"][0], row["cells"][2]
        assert three["cache_bytes"] == 3 * one["cache_bytes"] and three["limit"] > one["limit"]
    teacher, none = rows["teacher"]["cells"][1], rows["pattern=M"]["cells"][1]
    against = none["against_teacher"]
    assert against["cache_bytes"] == teacher["cache_bytes"] / none["cache_bytes"] and "against_teacher" not in teacher
    assert against["tokens_per_second"] == none["eager"] / teacher["eager"]
    assert against["prompt_tokens_per_second"] == pytest.approx(teacher["first_token_seconds"] / none["first_token_seconds"])
    assert rows["teacher"]["cells"][0]["cache_bytes"] == 2 * 2 * 2 * 8 * 24 * 4  # layers, k and v, heads, width, tokens
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("measuring ") for line in said] == [True, False] * 4 and generation.all_right(result)
    assert generation.table(result).row_count == 16


def test_the_limit_is_that_of_the_shapes(tiny):
    recipe = named_recipes("smollm2-135m_mamba2-hybrid", OVERRIDES, ())[0][1]
    teacher = generation._model("teacher", recipe, torch.device("cpu"))
    sizes, each = sizes_of(teacher), 2 * (48 * 48 * 2 + 48 * 16 * 2 + 3 * 48 * 64 + 2 * 48) + 48 + 96 * 48
    assert sizes.weights(1) == 4 * each and sizes.weights(1) == sum(p.nbytes for p in teacher.parameters())
    assert limit(sizes.weights(1), sizes.cache(100), 3, 1e9) == 3e9 / (4 * each + 3 * 100 * 2 * 2 * 2 * 8 * 4)


def test_protocols_and_memory_that_runs_out(tiny, monkeypatch):
    """A batch that does not fit is halved, or made smaller from a guess; the others are measured whatever one cell does."""
    papers = {
        "mamba": (generation.Protocol(10, 4, None, {}),),
        "hymba": (generation.Protocol(12, 4, 16, {"cache_bytes": 11.67}),),
    }
    monkeypatch.setattr("distill.benchmarks.protocols.PROTOCOLS", papers)
    monkeypatch.setattr(generation, "most_texts", lambda model, sizes, tokens: 20)
    measure = generation._measure

    def full(model, batch, part, chunk):
        if batch > 8 or part.prompt == 99:
            raise torch.OutOfMemoryError
        return measure(model, batch, part, chunk)

    monkeypatch.setattr(generation, "_measure", full)
    result = distill.bench("generation", overrides=OVERRIDES, lengths=[99, 9], protocols=["mamba", "hymba"])
    for row in result["rows"]:
        cells = [(cell.get("protocol"), cell["length"], cell["batch"], cell.get("not_run")) for cell in row["cells"]]
        assert cells == [(None, 99, 1, "out of memory"), (None, 9, 1, None), ("mamba", 10, 8, None), ("hymba", 12, 8, None)]
        assert row["cells"][2]["prompts"] == 2 and row["cells"][2]["eager"] > 0
    assert generation.all_right(result) and generation.table(result).row_count == 8
    said = list(generation.table(result).columns[-1].cells)[-1]
    assert said.startswith("hymba; 1st scaled up from 2 prompts; cache_bytes ") and said.endswith("x (the paper 11.67x)")


def test_what_it_refuses(tiny):
    for options, said in (
        ({"lengths": "2k,x"}, "--lengths has 'x'"),
        ({"batches": [0]}, "--batches has 0"),
        ({"prefill_chunk": 0}, "--prefill-chunk has 0"),
        ({"protocols": ["mambo"]}, "no protocol 'mambo'; did you mean 'mamba'"),
        ({"references": False}, "bench generation has no option 'references'"),
    ):
        with pytest.raises(UserError, match=said):
            distill.bench("generation", overrides=OVERRIDES, **options)
    with pytest.raises(UserError, match="bench steps takes one recipe, not 2"):
        distill.bench("steps", recipe=["quickstart", "quickstart"])


def test_the_command(tiny, tmp_path):
    words = ["bench", "generation", *OVERRIDES, "--lengths", "16", "--variant", "none: pattern=M", "--json", "x.json"]
    words[-1] = str(tmp_path / "x.json")
    assert CliRunner().invoke(app, words).exit_code == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["teacher", "smollm2-135m_mamba2-hybrid", "none"]


def test_the_plan_has_the_limit():
    """One text in bfloat16: tied weights count once, decays of a student are wider."""
    plan = make_plan(load("llama-3.2-1b_mamba2-hybrid", ["mixers.M.mixer=discrete_mamba2", "export=[]"]))
    for tokens, (teacher, student) in plan.decoding.items():
        assert teacher == 3e12 / (2 * plan.teacher_parameters + plan.cache[tokens][0])
        assert student == pytest.approx(3e12 / (2 * plan.student_parameters + plan.cache[tokens][1]), rel=1e-3)
    assert [round(rate) for rate in plan.decoding[1024]] == [1198, 1094]


def test_weights_that_a_token_does_not_read():
    """An embedding beside a head, and the experts of a mixture that few texts leave out."""
    untied = tiny_model("mistral-7b-v0.1")
    assert weight_bytes(untied) == 2 * (count_parameters(untied) - untied.get_input_embeddings().weight.numel())
    mixture = tiny_model("mixtral-8x7b-v0.1")  # 4 experts, 2 for a token
    experts = sum(part.numel() for name, part in mixture.named_parameters() if ".experts." in name)
    embedding = mixture.get_input_embeddings().weight.numel()
    whole = 2 * (count_parameters(mixture) - embedding)
    assert experts and weight_bytes(mixture, 1) == whole - experts and weight_bytes(mixture, 2) == whole


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (": pattern=M", "--variant ': pattern=M' should read"),
        ("none:", "--variant 'none:' should read"),
        ("teacher: pattern=M", "two rows would be called 'teacher'"),
        ("smollm2-135m_mamba2-hybrid: pattern=M", "two rows would be called 'smollm2-135m_mamba2-hybrid'"),
        ("deep: layers.pattern=M", "--variant 'deep: layers.pattern=M'"),
        ("odd: mixers.M.mixer=mambo2", "odd: "),
        ("odd: mixers.M={mixer: mamba2, window: {size: 0}}", "odd: "),
    ],
)
def test_a_variant_is_refused_by_name_before_anything_is_timed(tiny, monkeypatch, variant, message):
    monkeypatch.setattr(generation, "_row", None)
    with pytest.raises(UserError, match="^" + re.escape(message)):
        distill.bench("generation", overrides=OVERRIDES, variants=[variant], lengths="16")


def test_an_interrupted_bench_keeps_what_it_measured(tiny, monkeypatch, tmp_path):
    measured = generation._row

    def row(name, *arguments):
        if name == "none":
            raise KeyboardInterrupt
        return measured(name, *arguments)

    monkeypatch.setattr(generation, "_row", row)
    file = tmp_path / "x.json"
    words = ["bench", "generation", *OVERRIDES, "--lengths", "16", "--variant", "none: pattern=M", "--json", str(file)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 130 and "interrupted: the table has the measurements so far" in result.output
    found = json.loads(file.read_text())
    assert found["stopped"] and [row["model"] for row in found["rows"]] == ["teacher", "smollm2-135m_mamba2-hybrid"]


def test_a_variant_of_several_recipes_is_a_row_of_each():
    recipes = ["smollm2-135m_mamba2-hybrid", "smollm2-135m_mamba2"]
    rows = named_recipes(recipes, ["device=cpu"], ["narrow: mixers.M.mixer=discrete_mamba2"])
    assert [name for name, _ in rows] == [recipes[0], "narrow", recipes[1], "narrow"]
