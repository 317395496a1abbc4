"""Teachers held in bfloat16: every stage in both precisions, float32 masters of trained weights, runs that change types."""

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import distill
import students
import teachers
from distill.build import build
from distill.errors import Interrupted, UserError
from distill.evaluation.identity import check_identity
from distill.mixed_types import HANDLES, narrow_type
from distill.recipe_file import check
from distill.runs.checkpoint import restore_student, student_tensors
from distill.runs.stopper import Stopper
from distill.stages.imitate import Imitate
from distill.teacher_type import config_type, teacher_type
from students.config import Layout
from teachers.fingerprint import difference

MIXED = {"M": {"mixer": "discrete_mamba2", "window": {"size": 4, "sinks": 2}}}


def go(entries, place, written=None, **changes):
    return distill.run(
        check(entries | changes, "tiny.yaml"), runs=place, console=Console(file=written or io.StringIO(), width=400)
    )


def stopping_after(monkeypatch, number):
    steps = iter(range(1000))
    monkeypatch.setattr(Stopper, "due", lambda self: "enough" if next(steps) == number else None)


@pytest.fixture
def narrow(tiny_teacher):
    """The tiny teacher, whose files are float32, held in bfloat16."""
    return teachers.load(str(tiny_teacher), dtype=torch.bfloat16)


# a recipe's choice


@pytest.mark.parametrize(
    ("given", "device", "found"),
    [
        ({}, "cpu", torch.float32),
        ({}, "cuda", "stored"),
        ({"precision": "bfloat16"}, "cpu", torch.float32),
        ({"precision": "float32"}, "cuda", torch.float32),
        ({"teacher_dtype": "bfloat16"}, "cpu", torch.bfloat16),
        ({"teacher_dtype": "bfloat16", "precision": "float32"}, "cuda", torch.bfloat16),
        ({"teacher_dtype": "float32"}, "cuda", torch.float32),
        ({"teacher_dtype": "int8"}, "cuda", torch.bfloat16),
    ],
    ids=str,
)
def test_the_type_that_a_recipe_asks_for(tiny_recipe, given, device, found):
    recipe = check(tiny_recipe | given, "tiny.yaml")
    assert teacher_type(recipe, device) == found
    said = {torch.float16: torch.bfloat16, torch.bfloat16: torch.bfloat16, torch.float32: torch.float32, None: torch.float32}
    for stored, held in said.items():
        assert config_type(recipe, device, stored) == (held if found == "stored" else found)


@pytest.mark.parametrize(
    ("stored", "held"),
    [(torch.float32, torch.float32), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_a_checkpoint_is_held_in_its_own_type(tiny_teacher, tmp_path, stored, held):
    for file in tiny_teacher.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = {name: tensor.to(stored) for name, tensor in load_file(tiny_teacher / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    teacher = teachers.load(str(tmp_path), dtype="stored")
    assert {tensor.dtype for tensor in teacher.model.parameters()} == {held}
    assert teacher.model.model.rotary_emb.inv_freq.dtype == torch.float32
    wide = teachers.load(str(tmp_path))
    assert difference(wide.fingerprint, teacher.fingerprint) is None
    assert (wide.fingerprint == teacher.fingerprint) == (stored != torch.float16)
    teacher.check_account()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("teacher_4bit", True, "teacher_4bit is now teacher_dtype: int8"),
        ("teacher_dtype", "float16", "teacher_dtype is 'float16': it should be 'auto', 'float32', 'bfloat16' or 'int8'"),
    ],
)
def test_refused(tiny_recipe, key, value, said):
    with pytest.raises(UserError, match=said):
        check(tiny_recipe | {key: value}, "tiny.yaml")


# the numbers


def test_words_of_teachers_in_several_types(tiny_teacher, narrow, tmp_path):
    wide = teachers.load(str(tiny_teacher))
    known, rounded = wide.fingerprint, narrow.fingerprint
    assert rounded.startswith("rounded-") and difference(known, rounded) is difference(rounded, known) is None
    assert difference(known.rpartition("-")[0], rounded) is None  # a word of an earlier version
    with torch.no_grad():
        narrow.model.model.layers[2].mlp.up_proj.weight.mul_(1.5)
    changed = teachers.Teacher("x", narrow.model, narrow.tokenizer, narrow.family, rounded=True).fingerprint
    assert difference(known, changed) == difference(changed, rounded) == "weights"
    with torch.no_grad():
        wide.model.model.layers[2].mlp.up_proj.weight.mul_(1 + 1e-4)  # less than bfloat16 tells apart
    assert difference(known, teachers.Teacher("x", wide.model, wide.tokenizer, wide.family).fingerprint) == "weights"


def test_nothing_swapped_is_the_teacher_to_the_bit(narrow):
    found = check_identity(narrow, Layout.over(4, "AM", MIXED))
    assert found["logits"] == 0 and found["attention"] < 0.03


def test_mixers_begin_with_the_numbers_in_float32(narrow, tiny_teacher):
    """Of a teacher in float32 that has the same numbers, the same mixers to the bit."""
    wide = teachers.load(str(tiny_teacher))
    wide.model.load_state_dict({name: tensor.float() for name, tensor in narrow.model.state_dict().items()})
    for name in ("discrete_mamba2", "mamba2", "gated_deltanet", "shared_attention"):
        layout = Layout.over(4, "AM", {"M": {"mixer": name}})
        one, other = (build(teacher, layout)[0].mixers for teacher in (narrow, wide))
        for layer, mixer in one.items():
            state = mixer.state_dict()
            assert state and all(torch.equal(state[key], tensor) for key, tensor in other[layer].state_dict().items())
            assert {tensor.dtype for tensor in mixer.parameters()} == {torch.float32}


def test_what_does_not_train_lies_in_the_teachers_memory(narrow):
    held = dict(narrow.model.named_parameters())
    for train, own in (("mixers", ()), ("mixers+norms", ("norm",)), ("all", ("",)), ("lora", ())):
        student, transfers = build(narrow, Layout.over(4, "AM", MIXED))
        assert narrow_type(student) == torch.bfloat16
        stage = Imitate(narrow, student, Imitate.Options(tokens=1, lr=1e-3, train=train), transfers)
        stage.prepare()
        for name, parameter in student.named_parameters():
            if name.replace(".base_layer", "") in held:
                mine = any(part in name for part in own)
                shared = parameter.data_ptr() == held[name.replace(".base_layer", "")].data_ptr()
                assert shared != mine and parameter.dtype == (torch.float32 if mine else torch.bfloat16), (train, name)
            else:
                assert parameter.dtype == torch.float32, (train, name)
        hooked = {name for name, module in student.named_modules() if HANDLES in vars(module)}
        slots = {f"model.layers.{layer}.self_attn" for layer in (1, 3)}
        assert slots <= hooked if train != "all" else not hooked


def test_masters_come_back_as_such(narrow):
    """What a finished stage trained is not rounded to the type of the teacher's when a run goes on."""
    layout, name = Layout.over(4, "AM", MIXED), "model.layers.2.mlp.up_proj.weight"
    student, again = (build(narrow, layout)[0] for _ in range(2))
    trained = student.get_parameter(name)
    trained.data = trained.data.float() * (1 + 1e-4)
    restore_student(again, student_tensors(student, {name}))
    assert torch.equal(again.get_parameter(name), trained) and again.get_parameter(name).dtype == torch.float32
    assert narrow.model.get_parameter(name).dtype == torch.bfloat16
    with torch.no_grad():
        assert again(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


# whole runs


@pytest.mark.parametrize(
    ("precision", "train"),
    [("float32", "mixers+norms"), ("float32", "lora"), ("bfloat16", "all")],
)
def test_a_run_stops_goes_on_and_is_saved(tiny_recipe, tmp_path, monkeypatch, precision, train):
    stages = [{"initialise": {"tokens": 128}}, {"imitate": {"tokens": 384, "lr": 1e-3, "train": train}}]
    entries = tiny_recipe | {"teacher_dtype": "bfloat16", "precision": precision, "stages": stages, "meta_tokens": 2}
    entries |= {"export": ["portable"], "evaluation": tiny_recipe["evaluation"] | {"passkey": [], "documents": 2}}
    whole = load_file(go(entries, tmp_path / "whole").student / "model.safetensors")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopping_after(patch, 1)
        go(entries, tmp_path / "parts")
    folder = go(entries, tmp_path / "parts")
    saved = load_file(folder.student / "model.safetensors")
    assert saved.keys() == whole.keys() and all(torch.equal(saved[name], whole[name]) for name in whole)
    masters = {name for name, tensor in saved.items() if tensor.dtype == torch.float32}
    for name in saved:
        ours = ".mixer." in name or name.startswith("meta_tokens") or train == "all"
        ours |= ("norm" in name) if train == "mixers+norms" else train == "lora" and "_proj" in name
        assert (name in masters) == ours, name
    assert json.loads((folder.student / "config.json").read_text())["dtype"] == "float32"
    student = students.load(folder.student).eval()
    assert all(torch.equal(tensor, saved[name].float()) for name, tensor in student.state_dict().items() if name in saved)
    exported = load_file(folder.path / "export" / "portable" / "model.safetensors")
    assert all(torch.equal(tensor.to(exported[name].dtype), exported[name]) for name, tensor in saved.items())
    kept = student.float32_names
    for name, tensor in exported.items():
        assert (tensor.dtype == torch.float32) == bool(kept & set(name.split("."))), name
    ids = torch.randint(1, 320, (1, 12))
    teacher = teachers.load(entries["teacher"], dtype=torch.bfloat16)
    mixed = build(teacher, student.layout)[0]
    restore_student(mixed, saved)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        found, wanted = mixed(ids).logits.float(), student(ids).logits.float()
    assert (found - wanted).norm() < 0.03 * wanted.norm()  # what is loaded is float32 throughout


def test_a_run_goes_on_in_another_type(tiny_recipe, tmp_path, monkeypatch):
    """What began on a GPU in bfloat16 goes on where the same recipe holds its teacher in float32, and the other way."""
    for first, then in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        with monkeypatch.context() as patch:
            patch.setattr("distill.loading.teacher_type", lambda recipe, device, kind=first: kind)
            stopping_after(patch, 7)
            with pytest.raises(Interrupted):
                go(tiny_recipe, tmp_path / str(first))
        written = io.StringIO()
        monkeypatch.setattr("distill.loading.teacher_type", lambda recipe, device, kind=then: kind)
        folder = go(tiny_recipe, tmp_path / str(first), written)
        words = [str(kind).removeprefix("torch.") for kind in (first, then)]
        assert f"this run used teacher {words[0]}, products no; it goes on with teacher {words[1]}" in written.getvalue()
        facts = folder.read("run.json")
        assert facts["finished"] and facts["types"] == [f"teacher {word}, products no" for word in words]
