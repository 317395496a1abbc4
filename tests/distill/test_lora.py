"""LoRA: adapters have an effect in every family's modules; they are merged, or saved in a form that peft loads."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import students
from distill import export, run
from distill.build import build
from distill.errors import Interrupted, UserError
from distill.planning import make_plan
from distill.recipe_file import check
from distill.runs import checkpoint
from distill.runs.run_dir import RunDir
from distill.runs.stopper import Stopper
from distill.stages import adapters, stages_of
from distill.stages.imitate import Imitate
from students.config import Layout
from tests.conftest import tiny_entries

WINDOWED = {"mixer": "discrete_mamba2", "window": {"size": 4, "own": True}}  # has projections called as the attention's


@pytest.fixture
def student(teacher):
    return build(teacher, Layout.over(4, "AM", {"M": WINDOWED}))[0]


def test_targets_are_names_or_endings(student):
    everything = adapters.targets(student, None)
    assert len(everything) == 2 * 4 + 4 * 3 and not any(".mixer." in name for name in everything)
    kept = adapters.targets(student, ["q_proj", "mlp.up_proj"])
    assert set(kept) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 2)} | {
        f"model.layers.{i}.mlp.up_proj" for i in range(4)
    }
    assert adapters.parameters_of(adapters.targets(student, ["model.layers.0.mlp.up_proj"]), 3) == 3 * (32 + 48)


def test_adapters_begin_alike_whatever_was_drawn_before(teacher):
    begun = []
    for drawn in (0, 7):
        student, _ = build(teacher, Layout.over(4, "AM", {"M": WINDOWED}))
        torch.rand(drawn)
        adapters.add(student, ["model.layers.0.mlp.up_proj"], rank=2, alpha=4.0)
        begun.append(student.get_submodule("model.layers.0.mlp.up_proj").lora_A["default"].weight)
    assert torch.equal(*begun) and begun[0].any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("q_prj", r"'q_prj' is no module of the student; did you mean 'q_proj'\?"),
        ("c_attn", r"'c_attn' is no module .*linear layers outside the mixers: down_proj, gate_proj, k_proj, o_proj"),
        (
            "in_proj",
            r"layers.1.self_attn.mixer.ssm.in_proj, inside a mixer, which is trained whole.*outside the mixers: down_proj",
        ),
        ("mixer.window.q_proj", "inside a mixer"),
        ("conv1d", "inside a mixer"),
        ("lm_head", "the head, whose adapter would keep the fused loss"),
        ("embed_tokens", "of type Embedding, and adapters go on linear layers only"),
        ("mlp", "of type LlamaMLP, and adapters go on linear layers only"),
    ],
)
def test_targets_without_an_effect_are_refused(student, name, message):
    with pytest.raises(ValueError, match=message):
        adapters.targets(student, ["up_proj", name])


def test_recipes_with_useless_lora_are_refused_before_anything_runs(tiny_recipe):
    def refused(**options):
        stages = [*tiny_recipe["stages"][:3], {"imitate": {"tokens": 768, "lr": 1e-3, **options}}]
        stages += [{"align": {"tokens": 256, "lr": 1e-3}}] if options.get("lora", {}).get("save") else []
        with pytest.raises(UserError) as error:
            make_plan(check(tiny_recipe | {"stages": stages}, "tiny.yaml"))
        return str(error.value)

    assert "stages.imitate: lora.targets: 'in_proj' means" in refused(train="lora", lora={"targets": ["in_proj"]})
    assert "lora is given, but train is 'all'; set train: lora, or leave lora out" in refused(train="all", lora={"rank": 4})
    assert "a later stage would train on top" in refused(train="lora", lora={"save": "adapters"})


# (model type, its own names for sizes, the linear layers of a decoder layer)
FAMILIES = [
    ("llama", {}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ("phi3", {}, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    ("gpt_neox", {}, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ("falcon", {}, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ("gpt2", {}, {"c_attn", "c_proj", "c_fc"}),
]


def tiny(model_type):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    names = {"gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2}}.get(model_type, {})
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **names)).eval()


@pytest.mark.parametrize(("model_type", "options", "expected"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_every_family_has_its_own_linear_layers(model_type, options, expected):
    """The default targets are what is there; adapters on them learn, and merging keeps what they say."""
    model = tiny(model_type)
    model.mixers = {}
    assert adapters.endings(adapters.targets(model, None)) == expected
    ids = torch.randint(0, 32, (2, 6))
    plain = model(ids).logits
    model.requires_grad_(False)
    adapters.add(model, list(adapters.targets(model, None)), rank=2, alpha=4.0)
    assert torch.equal(model(ids).logits, plain)
    model(ids).logits.square().sum().backward()
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning and all(".lora_" in name for name in learning)
    assert all(parameter.grad.any() for name, parameter in learning.items() if ".lora_B." in name)
    with torch.no_grad():
        for name, parameter in learning.items():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    adapted = model(ids).logits
    adapters.merge(model)
    assert (adapted - plain).abs().max() > 1e-3 and torch.allclose(model(ids).logits, adapted, atol=1e-5)
    assert not [name for name, _ in model.named_parameters() if "lora" in name or "base_layer" in name]


@pytest.mark.parametrize("train", ["mixers", "mixers+norms", "all", "lora"])
def test_plan_counts_what_trains(teacher, tiny_recipe, train):
    lora = {"lora": {"rank": 3, "targets": ["up_proj", "q_proj"]}} if train == "lora" else {}
    tiny_recipe["stages"][3]["imitate"] |= {"train": train, **lora}
    recipe = check(tiny_recipe, "tiny.yaml")
    student, _ = build(teacher, Layout.over(4, recipe.pattern, recipe.mixers))
    stage = Imitate(teacher, student, stages_of(recipe)[3].options)
    stage.prepare()
    assert make_plan(recipe).trained["imitate"] == sum(parameter.numel() for _, parameter in stage.trained().values())


# whole runs


def entries_with(entries, save):
    stages = [entries["stages"][0], {"imitate": {"tokens": 512, "lr": 1e-2, "train": "lora"}}]
    stages[1]["imitate"]["lora"] = {"rank": 2, "save": save}
    evaluation = {"tokens": 64, "probe_tokens": 64, "passkey": []}
    return entries | {"stages": stages, "checkpoints": {"steps": 1}, "evaluation": evaluation}


def go(entries, runs, **options):
    return run(check(entries, "tiny.yaml"), runs=runs, **options)


def everything(folder):
    files = sorted((folder / "student").glob("*.safetensors"))
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def left(tmp_path_factory, tiny_teacher, text_files):
    """A finished run that left its adapters unmerged."""
    return go(entries_with(tiny_entries(tiny_teacher, text_files), "adapters"), tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("save", ["merged", "adapters"])
def test_stopping_in_the_middle_changes_no_bit(tiny_recipe, tmp_path, monkeypatch, save):
    entries = entries_with(tiny_recipe, save)
    whole = everything(go(entries, tmp_path / "whole").path)
    for after in (0, 1):
        steps = itertools.count()
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Stopper, "due", lambda self, s=steps, a=after: "enough" if next(s) == a else None)
            go(entries, tmp_path / "parts")
    (path,) = (tmp_path / "parts").glob("tiny-*")
    saved = checkpoint.tensors_of(checkpoint.latest(path / "checkpoints"), "student")
    assert any(".lora_B." in name for name in saved)
    assert not [name for name in saved if "base_layer" in name], "weights that nothing trained were saved"
    found = everything(go(entries, tmp_path / "parts").path)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def test_adapters_are_left_in_a_form_that_peft_loads(left, teacher, tmp_path):
    from peft import PeftConfig, PeftModel

    ids = torch.randint(1, 320, (2, 12))
    loaded = students.load(left.student)  # transformers puts the adapters back itself
    assert adapters.adapted(loaded)
    logits = loaded(ids).logits

    shutil.copytree(left.student, tmp_path / "plain", ignore=shutil.ignore_patterns("adapter_*"))
    plain = students.load(tmp_path / "plain")
    theirs = teacher.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in plain.state_dict().items() if ".mixer." not in name)
    assert (plain(ids).logits - logits).abs().max() > 1e-3
    assert PeftConfig.from_pretrained(left.student).r == 2
    again = PeftModel.from_pretrained(plain, left.student)
    assert torch.allclose(again(ids).logits, logits, atol=1e-6)

    written = export(left.path, out=tmp_path / "out", dtype="float32", verify=False)
    assert not list(written.glob("adapter_*")), "an export should need no peft"
    (tmp_path / "out" / "config.json").write_text((left.student / "config.json").read_text())
    assert torch.allclose(students.load(written)(ids).logits, logits, atol=1e-5)


def test_a_finished_stage_with_adapters_is_picked_up(left, tmp_path):
    path = shutil.copytree(left.path, tmp_path / left.path.name)
    before, folder = everything(path), RunDir(path)
    shutil.rmtree(folder.student)  # as if the run had been killed after its last checkpoint
    folder.write("run.json", {key: value for key, value in folder.read("run.json").items() if key != "finished"})
    run(left.recipe(), runs=tmp_path)
    after = everything(path)
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    assert json.loads((folder.student / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert folder.read("evaluations.json")["final"]["rows"] == left.read("evaluations.json")["final"]["rows"]


def test_bases_that_an_earlier_stage_trained_are_saved(tiny_recipe, tmp_path, monkeypatch):
    """Two imitate stages: the second one's adapters stand on weights that are no longer the teacher's."""
    entries = entries_with(tiny_recipe, "merged")
    entries["stages"].insert(1, {"imitate": {"tokens": 256, "lr": 1e-3, "train": "all"}})
    whole = everything(go(entries, tmp_path / "whole").path)
    steps = itertools.count()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Stopper, "due", lambda self: "enough" if next(steps) == 2 else None)
        go(entries, tmp_path / "parts")
    (path,) = (tmp_path / "parts").glob("tiny-*")
    assert checkpoint.latest(path / "checkpoints").name.startswith("2-imitate")
    found = everything(go(entries, tmp_path / "parts").path)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
