"""Recipes: the shipped ones parse, build and plan without a network; messages about mistakes name the key."""

import json
import re
import sys

import pytest
import yaml

import distill
from distill import schema
from distill.errors import UserError
from distill.plan_table import export_lines
from distill.planning import make_plan
from distill.recipe_file import check, load
from distill.shipped import find, shipped_folder
from distill.stages import stages_of
from distill.yaml_file import override

NATIVE = {  # whose students a class of transformers' own holds, and from which version on
    "llama-3-8b_mamba-in-llama": "5.23",
    "llama-3.2-1b_mamba2-hybrid": "5.23",
    "llama-3.2-1b_zamba2": "5.23",
    "qwen3-0.6b_gated-deltanet": None,
    "smollm2-135m_hymba-lite": "5.23",
    "smollm2-135m_mamba-in-llama": "5.23",
    "smollm2-135m_mamba2-hybrid": "5.23",
    "smollm2-135m_zamba": "5.23",
}
BOTH = ("llama-3.2-1b_mamba2-hybrid", "qwen3-0.6b_gated-deltanet", "smollm2-135m_mamba2-hybrid")  # exported as both
SHIPPED = sorted(path.stem for path in shipped_folder().glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_parse_and_plan(name):
    """`make_plan` builds teacher and student on the meta device from a config snapshot."""
    recipe = load(name)
    plan = make_plan(recipe)
    assert 0 < len(plan.layout.converted) <= len(plan.layout.pattern)
    assert plan.student_parameters > plan.teacher_parameters * 0.9
    assert next(iter(plan.tokens)) == "initialise" and sum(plan.tokens.values()) > 0
    assert plan.exports["portable"]["engines"]["transformers"] is None
    assert (plan.exports["native"]["refused"] is None) == (name in NATIVE)
    assert (recipe.export == ["native", "gguf"]) == (name in BOTH)
    if name in BOTH:
        assert plan.exports["gguf"]["engines"]["llama.cpp"] is None
    if name in NATIVE:
        assert plan.exports["native"]["since"] == NATIVE[name] and plan.exports["native"]["engines"]["vllm"] is None


def test_counts():
    assert schema.count("24k") == 24_000
    assert schema.count("2.8B") == 2_800_000_000
    assert schema.count(512) == 512
    for wrong in ("24x", "", "-1", True, "1.5.2k"):
        with pytest.raises(ValueError, match="is not a count"):
            schema.count(wrong)


def write(tmp_path, entries):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(entries))
    return path


def test_name_and_fingerprint(tmp_path, tiny_recipe):
    del tiny_recipe["name"]
    recipe = load(write(tmp_path, tiny_recipe))
    assert recipe.name == "mine"
    assert recipe.fingerprint == load(write(tmp_path, tiny_recipe)).fingerprint
    assert recipe.fingerprint != load(write(tmp_path, tiny_recipe), ["seed=1"]).fingerprint


def test_overrides(tmp_path, tiny_recipe):
    path = write(tmp_path, tiny_recipe)
    recipe = load(
        path, ["stages.align.lr=2e-3", "stages.0.tokens=1k", "data.seq_len=64", "mixers.M.window.size=9", "twin=true"]
    )
    options = {entry.name: entry.options for entry in stages_of(recipe)}
    assert options["align"].lr == 2e-3 and options["initialise"].tokens == 1000
    assert recipe.data.seq_len == 64 and recipe.mixers["M"]["window"] == {"size": 9, "sinks": 2} and recipe.twin


def test_options_may_be_left_out(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "teacher: x\npattern: M\nmixers: {M: {mixer: mamba2}}\n"
        "data: {train: [{path: a}], heldout: [{path: a}], seq_len: 8, batch: 1}\n"
        "stages:\n  - initialise:\n  - align: {tokens: 1k, lr: 1e-3}\n"
    )
    assert stages_of(load(path))[0].options.tokens == 100_000


MISTAKES = [
    ({"teachr": "x"}, r"mine\.yaml: teachr is not a key here; did you mean 'teacher'"),
    ({"data.seqlen": 4}, r"data\.seqlen is not a key here; did you mean 'seq_len'"),
    ({"data.seq_len": "many"}, r"data\.seq_len is 'many'"),
    ({"data.seq_len": 2}, r"data\.seq_len is 2: it should be a whole number from 8 to"),
    ({"data.batch": 0}, r"data\.batch is 0"),
    ({"data.train.0.pth": "x"}, r"data\.train\.0\.pth is not a key here; did you mean 'path'"),
    ({"data.train.0.hub": "org/x"}, "needs either path or hub"),
    ({"stages.align.tokens": "lots"}, r"stages\.align: tokens is 'lots': 'lots' is not a count"),
    ({"stages.align.learning_rate": 1e-3}, r"stages\.align: learning_rate is not a key here"),
    ({"stages.align.lr": -1.0}, r"stages\.align: lr"),
    ({"stages.align.lr": {"mixers": 1e-3}}, r"stages\.align: lr\.mixers is 'mixers'"),
    ({"stages.align.schedule": "linear"}, r"stages\.align: schedule is 'linear'"),
    ({"stages.align.warmup": 0.9}, "together exceed the whole stage"),
    ({"stages.imitate.train": "everything"}, r"stages\.imitate: train is 'everything'"),
    ({"stages.imitate.offline_logits": ""}, r"imitate: offline_logits is '': "),
    ({"stages.imitate.hidden_layers": [0]}, r"hidden_layers is \[0\], but its weight, hidden, is 0"),
    ({"stages.4": {"aline": {}}}, "there is no stage 'aline'; did you mean 'align'"),
    ({"stages.4": {"initialise": {}}}, "initialise can only come first"),
    ({"stages.4": {"align": {}, "orient": {}}}, "each entry of stages is one stage"),
    ({"stages": [{"align": {"tokens": 1, "lr": 0.1}}]}, "must begin with initialise"),
    ({"stages": []}, "must begin with initialise"),
    ({"precision": "fp8"}, "precision is 'fp8'"),
    ({"evaluation.passkey": [5]}, r"evaluation\.passkey\.0 is 5"),
    ({"mixers.mm": {"mixer": "mamba2"}}, "mixers"),
    ({"teacher_4bit": True}, "teacher_4bit is now teacher_dtype: int8"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[str(change) for change, _ in MISTAKES])
def test_mistakes_name_the_key(tmp_path, tiny_recipe, changes, message):
    for key, value in changes.items():
        if key == "stages.4":
            tiny_recipe["stages"].append(value)
        else:
            put(tiny_recipe, key.split("."), value)
    with pytest.raises(UserError, match=message) as error:
        load(write(tmp_path, tiny_recipe))
    assert "mine.yaml" in str(error.value)


def put(place, keys, value):
    for key in keys[:-1]:
        if isinstance(place, list):
            place = place[int(key)] if key.isdigit() else next(entry[key] for entry in place if key in entry)
        else:
            place = place[key]
    place[keys[-1]] = value


def test_rates_by_role_are_checked_before_anything_runs(tiny_recipe):
    put(tiny_recipe, ["stages", "imitate", "lr"], {"new": 1e-3, "ssm": 1e-3})
    with pytest.raises(UserError, match=r"stages\.imitate: .*this stage also trains 'window' parameters"):
        make_plan(check(tiny_recipe, "here"))


def test_missing_keys_are_listed(tmp_path, tiny_recipe):
    del tiny_recipe["teacher"], tiny_recipe["data"]["batch"]
    with pytest.raises(UserError, match=r"teacher is missing\n.*data\.batch is missing"):
        load(write(tmp_path, tiny_recipe))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.aline.lr=1", "there is no 'aline' here; did you mean 'align'"),
        ("stages.9.lr=1", "there is no '9' here"),
        ("novalue", "should read key.sub=value"),
        ("pattern.x=1", "pattern is 'AM' and has no parts; write the whole pattern, pattern='{keep: 0.25, by: recall}' or"),
        ("pattern.keep=8", "pattern is 'AM' and .* pattern='{keep: 8, by: recall}' or pattern=MMMA$"),
        ("pattern.by=kl", "pattern='{keep: 0.25, by: kl}' or pattern=MMMA$"),
        ("a=[1", "not valid YAML"),
    ],
)
def test_overrides_that_fit_nowhere(tmp_path, tiny_recipe, override, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, tiny_recipe), [override])


def test_the_pattern_that_a_refused_override_shows_is_one(tmp_path, tiny_recipe):
    with pytest.raises(UserError) as refused:
        load(write(tmp_path, tiny_recipe), ["pattern.keep=2"])
    shown = re.search(r"pattern='(.*?)'", str(refused.value))[1]
    assert load(write(tmp_path, tiny_recipe), [f"pattern={shown}"]).pattern == {"keep": 2, "by": "recall"}
    with pytest.raises(UserError, match=r"; write the whole pattern, stages.0.pattern='{keep: 1, by: recall}'"):
        override({"stages": [{"replace": {"pattern": "MMMA"}}]}, "stages.0.pattern.keep=1")


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [1", "not valid YAML"), ("- a", "should be a mapping"), ("teacher: a\nteacher: b", "'teacher' is given twice")],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load(path)


def test_finding():
    assert len({find(name).resolve() for name in ("quickstart", "recipes/quickstart.yaml", "quickstart.yaml")}) == 1
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        find("quickstrat")


def test_a_saved_recipe_is_the_same_recipe(tiny_recipe):
    recipe = check(tiny_recipe, "here")
    again = check(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True))), "there")
    assert again == recipe and again.fingerprint == recipe.fingerprint


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ({"mixer": "mamba2", "window": 64}, "write it as window: {size: 64}"),
        ({"mixer": "mamba2", "window": {"size": 4}, "lag": 2}, "has both a lag and a window"),
        ({"mixer": "mamba2", "window": {"size": "four"}}, "size is 'four'"),
        ({"mixer": "mamba2", "d_state": "big"}, "d_state is 'big'"),
        ({"mixer": "mamba2", "d_state": 0}, "d_state is 0, which is too small"),
        ({"mixer": "discrete_mamba2", "norm": 3}, "norm is 3"),
        ({"mixer": ["a"]}, "the mixer of 'M' is"),
    ],
)
def test_mixer_options_that_cannot_be(mixer, message):
    recipe = load("quickstart").model_copy(update={"mixers": {"M": mixer}})
    with pytest.raises(UserError, match=message):
        make_plan(recipe)


def test_an_export_target_that_does_not_exist():
    with pytest.raises(UserError, match="export: there is no target 'portabel'; did you mean 'portable'"):
        load("quickstart", ["export=[portabel]"])


def test_an_export_that_cannot_hold_the_student_is_refused_before_training():
    """One message, with every key that would have to change."""
    with pytest.raises(UserError) as caught:
        make_plan(load("llama-3.2-1b_samba", ["export=[portable, native]"]))
    said = str(caught.value)
    assert said.startswith("llama-3.2-1b_samba: export: native cannot hold this student: GraniteMoeHybrid (")
    assert (
        "mixers.M: the class has no mamba1, only mamba2" in said and "mixers.W.window is 2048, of 131072 positions" in said
    )


def test_an_export_that_needs_an_absent_package_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    """By a plan and by a run, with the command that installs it."""
    monkeypatch.setitem(sys.modules, "gguf", None)  # as where it is not installed
    recipe = load("smollm2-135m_mamba2-hybrid", ["teacher=package:nowhere/x.gguf"])
    for do in (make_plan, lambda asked: distill.run(asked, runs=tmp_path / "runs")):
        with pytest.raises(UserError) as caught:
            do(recipe)
        said = str(caught.value)
        assert said.startswith("smollm2-135m_mamba2-hybrid: export: gguf: ") and said.endswith("leave gguf out of export")
        assert "pip install 'distill-hybrids[gguf]'" in said
    assert not (tmp_path / "runs").exists()


def test_a_plan_prints_the_engines_of_every_target():
    lines = [*export_lines(make_plan(load("llama-3.2-1b_mamba2-hybrid")).exports)]
    assert "native: runs in transformers >= 5.23, vllm" in lines and "gguf: runs in llama.cpp" in lines
    assert any(
        line.startswith("    not in mlx: its gated norm is over all channels at once, not over 32 groups") for line in lines
    )
    assert lines[-1] == "    not in vllm, llama.cpp, mlx: it does not run code that comes with a model"
    refused = next(export_lines({"native": {"refused": "so"}}))
    assert refused == "native: refused: so"


def test_a_shared_block_computes_in_each_of_its_layers():
    """One block or two: other parameters, the same arithmetic."""
    one, two = (make_plan(load("smollm2-135m_zamba", [f"mixers.S.blocks={blocks}"])) for blocks in (1, 2))
    assert one.student_parameters < two.student_parameters
    assert one.flops == pytest.approx(two.flops)


def test_a_stage_is_overridden_by_number_as_the_file_has_it(tmp_path, tiny_recipe):
    """`stages.2.lr`, `stages.align.lr` and `stages.2.align.lr` are one key; of two stages of a name the number is needed."""
    path = write(tmp_path, tiny_recipe)
    spelled = [load(path, f"stages.{key}.tokens=9k").stages for key in ("2", "align", "2.align")]
    assert spelled[0] == spelled[1] == spelled[2] and spelled[0][2]["align"]["tokens"] == "9k"
    tiny_recipe["stages"].append({"align": {"tokens": 256, "lr": 1e-3}})
    path = write(tmp_path, tiny_recipe)
    with pytest.raises(UserError, match="'align' occurs 2 times here; give the number, 2 or 4"):
        load(path, ["stages.align.tokens=9k"])
    assert load(path, ["stages.4.tokens=9k"]).stages[4]["align"]["tokens"] == "9k"


def test_a_recipe_from_python(tmp_path, tiny_recipe):
    """A mapping is a recipe's entries, and stays as it is; one override may come without a list."""
    given = json.loads(json.dumps(tiny_recipe))
    made = load(tiny_recipe, "seed=7")
    assert made.seed == 7 and tiny_recipe == given and load(made) is made
    assert load(made, "seed=8").fingerprint == load(write(tmp_path, tiny_recipe), "seed=8").fingerprint
