"""Students at export: damage is refused by file and tensor; types and sizes; no path of the machine in the export."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import distill
import students
from distill.build import build
from distill.errors import UserError
from distill.recipe_file import check
from distill.stages.adapters import CONFIG
from students.config import Layout
from students.mixers import mixer_class
from tests.teachers.tiny import tiny_teacher

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def student(untrained_run, tmp_path, monkeypatch):
    """A student to damage, in the working folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(untrained_run / "student", tmp_path / "student")


def export(folder, **options):
    return distill.export(folder, **{"to": "portable", "out": "out", "verify": False, **options})


def changed(student, how):
    tensors = load_file(student / WHOLE)
    how(tensors)
    save_file(tensors, student / WHOLE, metadata={"format": "pt"})


def shard(student):
    """The weights in two files and an index."""
    tensors = load_file(student / WHOLE)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, student / file, metadata={"format": "pt"})
    (student / WHOLE).unlink()
    places = {name: file for file, part in parts.items() for name in part}
    (student / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return places


NORM, DOWN = "model.norm.weight", "model.layers.2.mlp.down_proj.weight"
DAMAGES = {
    "missing": (lambda tensors: tensors.pop(DOWN), [f"{WHOLE} lacks {DOWN}; delete"]),
    "several missing": (lambda tensors: [tensors.pop(DOWN), tensors.pop(NORM)], [f"lacks {DOWN} (and 1 more)"]),
    "NaN": (lambda tensors: tensors[DOWN].view(-1)[7:9].fill_(float("nan")), [f"{DOWN} has 2 values of 1,536 that are not"]),
    "infinite": (lambda tensors: tensors[NORM].fill_(float("-inf")), [f"{WHOLE}: {NORM} has 32 values of 32"]),
    "NaN in a mixer": (
        lambda tensors: tensors[next(name for name in tensors if name.endswith(".a_proj.weight"))].fill_(float("nan")),
        ["a_proj.weight has", "not finite"],
    ),
    "of another shape": (
        lambda tensors: tensors.update({NORM: torch.ones(31)}),
        [f"{WHOLE}: {NORM} has the shape [31], but by config.json it is [32]"],
    ),
    "extra": (
        lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.ones(3)}),
        [f"{WHOLE}: model.layers.9.mlp.up_proj.weight is not a weight of the model that config.json describes"],
    ),
    "whole numbers": (
        lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int32)}),
        [f"{WHOLE}: {NORM} holds I32, but weights are F32, BF16 or F16"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights(student, tmp_path, damage):
    how, parts = DAMAGES[damage]
    changed(student, how)
    refused(parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]


def refused(parts):
    with pytest.raises(UserError) as raised:
        export("student")
    said = str(raised.value)
    assert "student" in said and all(part in said for part in parts), said


def test_damaged_files(student):
    content = (student / WHOLE).read_bytes()
    for length, part in (
        (len(content) - 100, "is not a whole safetensors file"),
        (40, "ends inside its header"),
        (0, WHOLE),
    ):
        (student / WHOLE).write_bytes(content[:length])
        refused([part, WHOLE])
    (student / WHOLE).unlink()
    refused([f"there is no {WHOLE}"])
    (student / WHOLE).write_bytes(content)
    config = (student / "config.json").read_text()
    for text, parts in (
        ("{", ["config.json"]),
        (config.replace('"format": 2', '"format": 1'), ["config.json", "has format 1; this version reads 2"]),
        (config.replace('"intermediate_size": 48', '"intermediate_size": 40'), ["has the shape", "by config.json it is"]),
        (config.replace('"num_hidden_layers": 4', '"num_hidden_layers": 3'), ["config.json"]),
        (config.replace('"distill_llama"', '"distill_nothing"'), ["student"]),
    ):
        (student / "config.json").write_text(text)
        refused(parts)
    (student / "config.json").unlink()
    with pytest.raises(UserError, match=r"student is no run folder: it has no recipe\.yaml"):
        export("student")


def test_damaged_shards(student):
    places = shard(student)
    assert load_file(export("student") / "model-00002-of-00002.safetensors").keys() == {
        name for name, file in places.items() if "00002-of" in file
    }
    index = json.loads((student / INDEX).read_text())
    file = places[NORM]
    for weights, parts in (
        (
            {**places, "model.more.weight": file},
            [f"{file}: model.more.weight is missing, but {INDEX} says that it is in this file"],
        ),
        ({name: where for name, where in places.items() if name != NORM}, [f"{file}: {NORM} is there, but by {INDEX}"]),
        ({**places, NORM: "model-00003-of-00002.safetensors"}, ["model-00003-of-00002.safetensors, which is not"]),
    ):
        (student / INDEX).write_text(json.dumps({**index, "weight_map": weights}))
        refused(parts)
    (student / INDEX).write_text(json.dumps(index))
    tensors = load_file(student / file)
    tensors[NORM][3] = float("nan")
    save_file(tensors, student / file, metadata={"format": "pt"})
    refused([f"{file}: {NORM} has 1 values of 32"])


def test_a_tokenizer_that_is_missing_or_damaged(student):
    kept = {name: (student / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    (student / "tokenizer.json").unlink()
    refused(["it has no tokenizer (no tokenizer.json, tokenizer.model or vocab file)", "copy the teacher's tokenizer files"])
    for name, text in (("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("tokenizer_config.json", "[]")):
        (student / name).write_text(text)
        refused(["the tokenizer in student cannot be loaded", "copy the teacher's tokenizer files there"])
        (student / name).write_text(kept[name])
    export("student")


def test_damaged_adapters(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    imitate = {"tokens": 128, "lr": 1e-2, "train": "lora", "lora": {"rank": 2, "save": "adapters"}}
    entries = tiny_recipe | {"stages": [{"initialise": {"tokens": 64}}, {"imitate": imitate}]}
    entries["evaluation"] = {"tokens": 64, "probe_tokens": 64, "passkey": []}
    run = distill.run(check(entries, "here"), runs=tmp_path / "runs")
    assert (run.student / CONFIG).exists()
    out = export(run.path, dtype="float32")
    assert not list(out.glob("adapter_*")) and students.load(out).dtype == torch.float32
    file = run.student / "adapter_model.safetensors"
    whole = load_file(file)
    first = next(name for name in whole if name.endswith("lora_A.weight"))
    other = first.replace("lora_A", "lora_B")
    layer = first.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    for changes, parts in (
        ({first: torch.full_like(whole[first], float("nan"))}, [f"{first} has values that are not finite"]),
        ({first: None}, [f"{layer} has one factor of an adapter, not both"]),
        ({first: whole[first][:, :-1].contiguous()}, [f"the factors of {layer} have the shapes", "do not fit its weight"]),
        ({first.replace("layers.", "layers.7"): whole[first]}, ["is not a layer of the student"]),
        ({"other": whole[other]}, ["other is not a factor of a low-rank adapter"]),
    ):
        tensors = {name: tensor.clone() for name, tensor in {**whole, **changes}.items() if tensor is not None}
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError) as raised:
            export(run.path)
        assert "adapter_model.safetensors" in str(raised.value) and all(part in str(raised.value) for part in parts)
    file.unlink()
    with pytest.raises(UserError, match=f"{CONFIG} is there, but no adapter_model.safetensors"):
        export(run.path)


@pytest.mark.parametrize("name", ["mixtral-8x7b-v0.1", "gpt2"])
def test_students_of_other_families(name, teacher, tmp_path):
    """Those whose weights have other names in files than in memory are whole too, and what they lack is named."""
    student = build(tiny_teacher(name), Layout("AM", {"M": {"mixer": "discrete_mamba2"}}))[0].eval()
    folder, ids = tmp_path / "student", torch.randint(1, 90, (1, 12))
    student.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    out = export(folder, out=tmp_path / "out", dtype="float32")
    assert torch.equal(students.load(out).eval()(ids).logits, student(ids).logits)
    tensors = load_file(folder / WHOLE)
    lost = next(one for one in sorted(tensors) if "mlp" in one or "experts" in one)
    changed(folder, lambda found: found.pop(lost))
    with pytest.raises(UserError, match=f"cannot be exported: .*{WHOLE} lacks |cannot be exported: .*{lost}"):
        export(folder, out=tmp_path / "other")


# types


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1", "rg_lru", "longhorn", "gated_deltanet", "retention"])
def test_portable_is_bfloat16_and_its_decays_float32(mixer, teacher, tmp_path):
    """In the file and in the model, whatever type is asked for; and the student is the same but for the rounding."""
    folder = tmp_path / "student"
    build(teacher, Layout("AMAM", {"M": {"mixer": mixer}}))[0].save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    out = export(folder, out=tmp_path / "out")
    narrow, wide = load_file(out / WHOLE), load_file(folder / WHOLE)
    kept = set(mixer_class(mixer).float32)
    assert narrow.keys() == wide.keys() and json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in narrow.items():
        is_kept = bool(kept & set(name.split(".")))
        assert tensor.dtype == (torch.float32 if is_kept else torch.bfloat16), name
        assert torch.equal(tensor, wide[name].to(tensor.dtype)), name
    assert any(tensor.dtype == torch.float32 for tensor in narrow.values())
    with safe_open(out / WHOLE, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    for options in ({}, {"dtype": "auto"}, {"dtype": torch.bfloat16}):
        model = students.load(out, **options)
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in narrow.items())
    rounded = students.load(out, dtype=torch.float32).eval()
    ids = torch.randint(1, 320, (2, 17))
    with torch.no_grad():
        wanted, found = students.load(folder).eval()(ids).logits, rounded(ids).logits
        own = model.eval()(ids).logits
    assert 0 < (found - wanted).norm() < 0.03 * wanted.norm() and own.dtype == torch.bfloat16
    assert (own.float() - wanted).norm() < 0.05 * wanted.norm()


def test_float32_is_the_student_to_the_bit(student):
    out = export("student", dtype="float32")
    before, after = load_file(student / WHOLE), load_file(out / WHOLE)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((out / "generation_config.json").read_text()) == json.loads(
        (student / "generation_config.json").read_text()
    )


def test_shards_keep_their_names_and_say_their_size(student):
    shard(student)
    out = export("student")
    index = json.loads((out / INDEX).read_text())
    found = {name: tensor for file in set(index["weight_map"].values()) for name, tensor in load_file(out / file).items()}
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    students.load(out)


# the machine


def test_no_word_of_the_machine(student, tiny_teacher, tmp_path):
    for name, key, value in (
        ("config.json", "_name_or_path", str(tiny_teacher)),
        ("tokenizer_config.json", "name_or_path", str(tiny_teacher)),
        ("tokenizer_config.json", "tokenizer_file", "C:\\models\\tokenizer.json"),
        ("generation_config.json", "_name_or_path", "~/models/x"),
    ):
        content = json.loads((student / name).read_text())
        (student / name).write_text(json.dumps({**content, key: value}))
    before = json.loads((student / "config.json").read_text())
    assert before["distill"]["teacher"]["reference"] == str(tiny_teacher)
    out = export("student")
    after = json.loads((out / "config.json").read_text())
    assert after["distill"]["teacher"] == {**before["distill"]["teacher"], "reference": tiny_teacher.name}
    for file in out.iterdir():
        if file.suffix in (".json", ".md", ".jinja") or file.name.startswith("."):
            text = file.read_text()
            assert str(tmp_path) not in text and str(tiny_teacher.parent) not in text and "models" not in text, file
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_file"] == "tokenizer.json"
