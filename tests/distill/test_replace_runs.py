"""A run with `replace`: what it writes, stopped and resumed, in two processes, with scorers on the present student."""

import json

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from distill import run
from distill.build import build
from distill.errors import Interrupted, UserError
from distill.evaluation import samples
from distill.recipe import Selected
from distill.recipe_file import check, load
from distill.runs import checkpoint
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.selection.checking import marked
from distill.selection.present import choose_layers
from distill.stages import stages_of
from distill.stages.replace import MADE_FROM
from students.config import Layout
from tests.conftest import tiny_entries
from tests.distill.replacing import logits, trained
from tests.distill.stage_steps import batch, changed, snapshot
from tests.distill.two_processes import in_two

# a run


def steps_of_a_run(tiny_teacher, text_files):
    """Half of the layers, a quarter by a scorer, and none: every kind of stage in between, a checkpoint a step."""
    entries = tiny_entries(tiny_teacher, text_files) | {"checkpoints": {"steps": 1}}
    entries["evaluation"] = {"tokens": 64, "probe_tokens": 32, "passkey": [64], "passkey_trials": 1}
    entries["stages"] = [
        {"initialise": {"tokens": 128}},
        {"imitate": {"tokens": 256, "lr": 1e-2, "train": "all"}},
        {"replace": {"pattern": {"keep": 1, "by": "kl", "tokens": 64}, "tokens": 128}},
        {"align": {"tokens": 256, "lr": 1e-2}},
        {"replace": {"pattern": "M", "tokens": 128}},
        {"imitate": {"tokens": 256, "lr": 1e-2, "train": "mixers+norms"}},
    ]
    return entries


@pytest.fixture
def entries(tiny_teacher, text_files, monkeypatch):
    """The same without twin and export."""
    monkeypatch.setattr(samples, "NEW_TOKENS", 2)
    return steps_of_a_run(tiny_teacher, text_files)


def outcome(folder):
    lines = [(line["stage_index"], line["step"], line["loss"]) for line in folder.metrics()]
    return load_file(folder.student / "model.safetensors"), lines, folder.read("transfer.json")


def assert_same(one, other):
    assert one[1:] == other[1:] and one[0].keys() == other[0].keys()
    assert all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_teacher, text_files):
    """An undisturbed run, with twin and export."""
    entries = steps_of_a_run(tiny_teacher, text_files) | {"twin": True, "export": ["portable"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "NEW_TOKENS", 2)
        return run(check(entries, "tiny.yaml"), runs=tmp_path_factory.mktemp("whole"))


def test_a_run_says_what_it_converted_everywhere(whole):
    after = whole.read("evaluations.json")["after"]
    first, last = after["2-replace"], after["4-replace"]
    assert len(first["converted"]) == 1 and first["pattern"].count("A") == 1 and last["pattern"] == "MMMM"
    assert sorted(first["converted"] + last["converted"]) == [0, 2]
    for found in (first, last):
        assert found["identity"]["logits"] < 1e-6 and max(found["identity"]["layers"].values()) < 1e-4
        assert set(found["identity"]["layers"]) == {str(layer) for layer in found["converted"]}
    assert {f"align/layer_0{layer}" for layer in range(4)} <= after["5-imitate"]["probe"].keys()
    assert json.loads((whole.student / "config.json").read_text())["distill"]["layout"]["pattern"] == "MMMM"
    assert (
        json.loads((whole.path / "export" / "portable" / "config.json").read_text())["distill"]["layout"]["pattern"]
        == "MMMM"
    )
    assert whole.read("evaluations.json")["final"]["pattern"] == "MMMM"
    assert "Stage 2-replace converted layers" in (whole.path / "report.html").read_text()
    chosen = whole.read("selection-2-replace.json")
    assert chosen["chosen"]["pattern"] == first["pattern"] and len(chosen["measured"]) > 2
    sources = whole.read("transfer.json")["sources"]
    assert {layer for layer in range(4) if f"model.layers.{layer}.self_attn.mixer.{MADE_FROM}" in sources} == {0, 2}


def test_a_twin_converts_the_same_layers(whole):
    after, twin = whole.read("evaluations.json")["after"], yaml.safe_load((whole.path / "twin" / "recipe.yaml").read_text())
    patterns = [stage["replace"]["pattern"] for stage in twin["stages"] if "replace" in stage]
    assert patterns == [after[key]["pattern"] for key in ("2-replace", "4-replace")]
    assert twin["mixers"]["M"]["mixer"] == "attention"
    saved = json.loads((whole.path / "twin" / "student" / "config.json").read_text())["distill"]["layout"]
    assert saved["pattern"] == "MMMM" and saved["mixers"]["M"]["mixer"] == "attention"


def test_a_run_that_is_stopped_everywhere_ends_in_the_same_bits(entries, whole, tmp_path, monkeypatch):
    """Also between the measurements of the layers to convert, each of which is kept."""
    recipe, stops = check(entries, "tiny.yaml"), []
    while True:
        steps = iter(range(10_000))
        monkeypatch.setattr(Stopper, "due", lambda self, steps=steps: "enough" if next(steps) == 2 else None)
        try:
            parts = run(recipe, runs=tmp_path)
            break
        except Interrupted as reason:
            stops.append(str(reason))
    assert len(stops) >= 3 and any("while selecting" in stop and "selection-2-replace.json" in stop for stop in stops)
    assert_same(outcome(whole), outcome(parts))


def test_a_run_that_ends_while_layers_are_converted(entries, whole, tmp_path, monkeypatch):
    """Everything of the stage is written but its checkpoint, or nothing is: it converts them again, to the same bits."""
    recipe, begin, reinstated = check(entries, "tiny.yaml"), checkpoint.begin, []

    def fail(folder, state):
        if state.stage in (2, 4) and state.stage not in reinstated:
            reinstated.append(state.stage)
            raise OSError("power lost")
        return begin(folder, state)

    monkeypatch.setattr(checkpoint, "begin", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="power lost"):
            run(recipe, runs=tmp_path)
    assert_same(outcome(whole), outcome(run(recipe, runs=tmp_path)))


def test_a_checkpoint_of_another_layout_is_refused(entries, tmp_path, monkeypatch):
    recipe = check(entries, "tiny.yaml")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Stopper, "due", lambda self: None if not list(tmp_path.glob("*/checkpoints/2-*")) else "enough")
        run(recipe, runs=tmp_path)
    (state,) = tmp_path.glob("*/checkpoints/3-*/state.json")
    saved = checkpoint.read_state(state.parent)
    for layouts in ({}, {"2": "AMAM"}, {"2": "MMXM"}):
        saved.layouts = layouts
        saved.digest = saved.hashed()
        state.write_text(json.dumps(vars(saved)))
        with pytest.raises(UserError, match="no stage of this recipe makes the layout"):
            run(recipe, runs=tmp_path)


def test_two_processes_convert_the_same_layers(entries, whole, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(entries))
    code, said = in_two("-m", "distill.cli", "run", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "two"))
    assert code == 0, said[-3000:]
    (path,) = (tmp_path / "two").glob("tiny-*")
    found, expected = (json.loads((folder / "evaluations.json").read_text()) for folder in (path, whole.path))
    for key in ("2-replace", "4-replace"):
        assert found["after"][key]["pattern"] == expected["after"][key]["pattern"]
    kls = [one["final"]["rows"]["student"]["fidelity"]["kl"] for one in (found, expected)]
    assert kls[0] == pytest.approx(kls[1], rel=1e-2)


def test_a_run_from_a_student_converts_more_of_it(entries, tiny_recipe, tmp_path):
    """Its own attention, as its run trained it; the layout is its config's."""
    entries["stages"] = entries["stages"][:2]
    first = run(check(entries, "tiny.yaml"), runs=tmp_path)
    entries = {name: value for name, value in tiny_recipe.items() if name not in ("pattern", "mixers")}
    entries |= {"student": str(first.path), "stages": [{"replace": {"layers": [2], "tokens": 64}}]}
    second = run(load(entries), runs=tmp_path)
    assert json.loads((second.student / "config.json").read_text())["distill"]["layout"]["pattern"] == "AMMM"
    before, after = (load_file(one.student / "model.safetensors") for one in (first, second))
    kept = {name for name in before if "layers.2.self_attn" not in name}
    assert kept < after.keys() and all(torch.equal(before[name], after[name]) for name in kept)


# scorers on the present student


@pytest.mark.parametrize("options", [{"by": "greedy", "measure": "kl", "beam": 1}, {"by": "gates", "training_tokens": 64}])
@pytest.mark.parametrize("stand_in", ["window", "mixer"])
def test_scorers_leave_the_student_as_it_was(entries, tmp_path, options, stand_in):
    pattern = {"keep": 1, "tokens": 64, "length": 64, "trials": 1, "families": ["passkey"], "stand_in": stand_in} | options
    entries["stages"][2] = {"replace": {"pattern": pattern, "tokens": 64}}
    recipe = check(entries, "tiny.yaml")
    session = Session.open(recipe)
    student, _ = trained(session.teacher, "AMAA", recipe.mixers)
    before, text = snapshot(student), batch()
    wanted, modules = logits(student, text), [type(part) for part in student.modules()]
    folder = RunDir.open(recipe, tmp_path, False)
    entry = stages_of(recipe)[2]
    read = ["passkey"] if options["by"] == "gates" else []
    assert marked(recipe).selected == Selected(by=options["by"], families=read)
    stay = choose_layers(session, folder, entry, student, session.calibration(0), Console(quiet=True), Stopper())
    assert len(stay) == 1 and stay[0] in (0, 2, 3)
    assert not changed(student, before) and torch.equal(logits(student, text), wanted)
    assert [type(part) for part in student.modules()] == modules and student.layout.pattern == "AMAA"
    ranking = folder.read(f"selection-{entry.key}.json")["chosen"]["ranking"]
    assert {int(one["name"]) for one in ranking} <= {0, 2, 3}


@pytest.mark.parametrize("counts", [1, 3])
def test_the_layer_that_counts_stays(entries, tmp_path, counts):
    """Of attentions that add nothing but one, that one stays; what is converted already stands aside."""
    pattern = {"keep": 1, "by": "kl", "tokens": 64, "window": 2, "sinks": 0}
    entries["mixers"] = {"M": {"mixer": "attention"}}
    entries["stages"][2] = {"replace": {"pattern": pattern, "tokens": 64}}
    recipe = check(entries, "tiny.yaml")
    session = Session.open(recipe)
    student, _ = build(session.teacher, Layout.over(4, "MAAA", recipe.mixers))
    with torch.no_grad():
        for layer in {1, 2, 3} - {counts}:  # the teacher's too: it is the same memory
            student.model.layers[layer].self_attn.o_proj.weight.zero_()
    entry, folder = stages_of(recipe)[2], RunDir.open(recipe, tmp_path, False)
    stay = choose_layers(session, folder, entry, student, session.calibration(0), Console(quiet=True), Stopper())
    ranking = folder.read(f"selection-{entry.key}.json")["chosen"]["ranking"]
    assert stay == [counts] and ranking[0]["score"] > 1e-3 and all(abs(one["score"]) < 1e-6 for one in ranking[1:])


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_teacher_in_bfloat16(entries, tmp_path, precision):
    """Masters that a stage trained beside weights of the teacher's type: what the mixers are made from is float32."""
    entries["stages"] = [entries["stages"][1], {"replace": {"layers": [2], "tokens": 64}}, entries["stages"][3]]
    entries["stages"].insert(0, {"initialise": {"tokens": 64}})
    entries |= {"precision": precision, "teacher_dtype": "bfloat16"}
    folder = run(check(entries, "tiny.yaml"), runs=tmp_path)
    found = folder.read("evaluations.json")["after"]["2-replace"]["identity"]
    assert found["logits"] < 1e-2 and found["layers"]["2"] < 1e-1
    tensors = load_file(folder.student / "model.safetensors")
    prefix = "model.layers.2.self_attn."
    assert {name.startswith(prefix + "mixer.") for name in tensors if name.startswith(prefix)} == {True}
