"""A run that starts from a finished student: its weights, layout and record, and refusals."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import distill
import students
from distill.build import build, layout_of
from distill.errors import Interrupted, UserError
from distill.recipe_file import check, load
from distill.runs.run_dir import RunDir
from distill.training.beginning import begin_from
from tests.conftest import tiny_entries


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_teacher, text_files):
    """A finished run whose skeleton was trained too."""
    entries = tiny_entries(tiny_teacher, text_files)
    entries["stages"] = [{"initialise": {"tokens": 256}}, {"imitate": {"tokens": 256, "lr": 1e-3}}]
    return distill.run(entries, runs=tmp_path_factory.mktemp("first")).path


@pytest.fixture
def second(first, tiny_teacher, text_files):
    """Entries of a run that starts from it."""
    entries = tiny_entries(tiny_teacher, text_files)
    del entries["pattern"], entries["mixers"]
    return entries | {"name": "second", "student": str(first), "stages": [{"imitate": {"tokens": 256, "lr": 1e-3}}]}


def started(entries, teacher):
    recipe = load(entries)
    student, transfers = build(teacher, layout_of(recipe.pattern, recipe.mixers, teacher.n_layers, "x", recipe.meta_tokens))
    return student, begin_from(recipe, teacher, student, transfers), transfers


def test_the_weights_are_those_of_the_student(first, second, teacher):
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    student, changed, transfers = started(second, teacher)
    wanted = students.load(first / "student")
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name
    assert "model.layers.0.mlp.up_proj.weight" in changed and not any(".mixer." in name for name in changed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.model.state_dict().items())
    report = json.loads((first / "transfer.json").read_text())["sources"]
    assert transfers[1].sources == {
        name.partition(".mixer.")[2]: said
        for name, said in report.items()
        if name.startswith("model.layers.1.") and ".mixer." in name
    }


def test_narrow_weights_are_taken_as_they_are(first, second, teacher, tmp_path):
    place = tmp_path / "narrow"
    shutil.copytree(first / "student", place)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(place / "model.safetensors").items()}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    student, _, transfers = started(second | {"student": str(place)}, teacher)
    found = student.state_dict()
    assert all(
        found[name].dtype == torch.float32 and torch.equal(found[name].bfloat16(), tensor)
        for name, tensor in tensors.items()
    )
    assert set(transfers[1].sources.values()) == {f"of the student {place}"}


def test_a_second_run_goes_on_from_it(first, second, tmp_path):
    recipe = load(second)
    assert recipe.pattern == "AMAM" and recipe.mixers["M"]["mixer"] == "discrete_mamba2"
    plan = distill.plan(second, gpus=1)
    assert set(plan.tokens) == {"imitate"} and "imitate" in plan.needs
    folder = distill.run(second, runs=tmp_path)
    facts = folder.read("run.json")
    assert facts["finished"] and facts["student"]["reference"] == str(first) and len(facts["student"]["sha256"]) == 64
    assert folder.read("transfer.json")["sources"].keys() == RunDir(first).read("transfer.json")["sources"].keys()
    before, after = (run.metrics()[-1]["loss"] for run in (RunDir(first), folder))
    assert after < 1.2 * before and folder.metrics()[0]["loss"] < 1.2 * before  # not that of the untrained one
    assert (folder.path / "student" / "model.safetensors").is_file()


def test_a_stopped_run_goes_on_to_the_same_bits(second, tmp_path, first):
    """And not where the student's weights are others by then."""
    place = tmp_path / "copy"
    shutil.copytree(first / "student", place)
    entries = second | {"student": str(place), "checkpoints": {"steps": 1}}
    whole = distill.run(entries, runs=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr("distill.runs.stopper.Stopper.due", lambda stopper: "enough")
        distill.run(entries, runs=tmp_path / "parts")
    stopped = RunDir.path_of(load(entries), tmp_path / "parts")
    file = place / "model.safetensors"
    kept, tensors = file.read_bytes(), load_file(file)
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"of the student .*copy differ from those that this run was started with"):
        distill.run(entries, runs=tmp_path / "parts")
    file.write_bytes(kept)
    parts = distill.run(entries, runs=tmp_path / "parts")
    assert parts.path == stopped
    ours, theirs = (load_file(run.path / "student" / "model.safetensors") for run in (parts, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_what_cannot_be_is_refused(first, second, tmp_path):
    def refused(change, message):
        with pytest.raises(UserError, match=message):
            distill.plan({**second, **change})

    nowhere = str(tmp_path / "nowhere")
    refused({"student": nowhere}, rf"second: student is '{nowhere}', but there is no student in {nowhere}")
    refused({"pattern": "MA"}, r"second: pattern is 'MA', but the student .* has 'AMAM'; leave pattern out")
    refused({"mixers": {"M": {"mixer": "mamba2"}}}, r"second: mixers.M is {'mixer': 'mamba2'}, but the student")
    refused({"meta_tokens": 3}, "second: meta_tokens is 3, but the student .* has 0; leave meta_tokens out")
    refused({"pattern": {"keep": 1, "by": "uniform"}}, "second: pattern selects a layout, but the student")
    refused({"twin": True}, "second: twin: true trains windows that are made from the teacher's attention")
    refused({"stages": []}, "second: stages is empty, so the student .* would not be trained; name a stage")
    refused(
        {"stages": [{"initialise": {}}]}, r"stages.0: initialise makes the mixers anew, but the run starts from the student"
    )
    assert load({**second, "pattern": "AM"}).pattern == "AMAM"
    with pytest.raises(UserError, match=r"second: the student .* already has a layout; leave out student to select one"):
        distill.select(second, runs=tmp_path)
    adapted = tmp_path / "adapted"
    shutil.copytree(first / "student", adapted)
    (adapted / "adapter_config.json").write_text("{}")
    refused({"student": str(adapted)}, "has unmerged adapters .adapter_config.json.; merge them with")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "llama"}')
    refused({"student": str(foreign)}, "is not of a student of distill; name a run folder")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"vocab_size": 336}, "a vocabulary of {own}, but the teacher .* one of 336: they cannot be compared"),
        ({"num_hidden_layers": 2}, "{own} layers, but the teacher .* has 2; name a student of this teacher, or"),
        ({"hidden_size": 16}, r"{own} channels \(hidden_size\), but the teacher .* has 16; name a student of this"),
    ],
)
def test_a_plan_compares_the_configs_as_a_run_does(first, second, tiny_teacher, tmp_path, entries, said):
    config = json.loads((tiny_teacher / "config.json").read_text())
    own = json.loads((first / "student" / "config.json").read_text())[next(iter(entries))]
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, **entries}))
    teacher.save_pretrained(tmp_path / "teacher")
    for file in tiny_teacher.glob("*token*"):
        shutil.copy(file, tmp_path / "teacher")
    refused = []
    for verb, options in ((distill.plan, {}), (distill.run, {"runs": tmp_path / "runs"})):
        with pytest.raises(UserError, match=f"{re.escape(str(first / 'student'))} has {said.format(own=own)}") as error:
            verb(second | {"teacher": str(tmp_path / "teacher")}, **options)
        refused.append(str(error.value))
    assert refused[0] == refused[1] and not (tmp_path / "runs").exists()


def test_students_of_others_are_refused(first, second, teacher, tmp_path):
    place = tmp_path / "other"
    shutil.copytree(first / "student", place)
    config = json.loads((place / "config.json").read_text())
    made = config["distill"]["teacher"]
    made["fingerprint"] = "".join("0" if digit.isalnum() else digit for digit in made["fingerprint"])
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"was distilled from .* pass its own teacher with --teacher"):
        started(second | {"student": str(place)}, teacher)
    del config["distill"]["teacher"]
    (place / "config.json").write_text(json.dumps(config))
    started(second | {"student": str(place)}, teacher)  # one that another program made, or fine-tuned
    tokens = json.loads((place / "tokenizer.json").read_text())
    tokens["model"]["vocab"] |= {"a": tokens["model"]["vocab"]["b"], "b": tokens["model"]["vocab"]["a"]}
    (place / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(UserError, match=r"has another tokenizer than the teacher .*: 'a' is \d+ there and \d+ here"):
        started(second | {"student": str(place)}, teacher)


def test_recipes_without_a_student_keep_their_fingerprint(tiny_recipe, second):
    assert "student" not in check(tiny_recipe, "x").yaml()
    assert load(second).fingerprint != load(second | {"student": second["student"] + "/student"}).fingerprint
