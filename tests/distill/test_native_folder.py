"""native: the written folder is whole, sharded, rounded, with adapters merged; files that do not fit are refused."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import distill
from distill.exporters import saved as saving
from distill.exporters import target
from distill.exporters.containers import container_of, granite
from distill.exporters.source import Source
from distill.exporters.target import Form
from distill.recipe_file import check
from distill.stages import adapters
from tests.conftest import tiny_entries
from tests.distill.native_students import EXACT, ONE, M, exported, furthest, plain
from tests.distill.random_students import loaded, saved, student_of


def test_the_folder_is_whole(tmp_path, tokenizer):
    """The teacher's tokenizer, the settings of generation, the names that engines know; nothing of this machine."""
    student = student_of("llama", "AMMM", {"M": M})
    student.generation_config.update(temperature=0.7, do_sample=True)
    student.config.distill["teacher"] = {"reference": str(tmp_path), "fingerprint": None}
    folder, out = saved(student, tmp_path / "student", tokenizer), tmp_path / "native"
    target("native").write(folder, out, Form())
    entries = json.loads((out / "config.json").read_text())
    assert entries["layer_types"] == ["attention", "mamba", "mamba", "mamba"] and entries["dtype"] == "bfloat16"
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert entries["transformers_version"] == transformers.__version__
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.7
    assert AutoTokenizer.from_pretrained(out)("It was.").input_ids == tokenizer("It was.").input_ids
    assert {path.name for path in out.iterdir()} == {path.name for path in folder.iterdir()}


def test_bfloat16_rounds_all_but_the_decays(tmp_path):
    folder, exact = exported("granite", tmp_path)
    target("native").write(folder, tmp_path / "rounded", Form("bfloat16"))
    exact, rounded = (load_file(place / "model.safetensors") for place in (exact, tmp_path / "rounded"))
    assert exact.keys() == rounded.keys()
    for name, tensor in exact.items():
        wide = name.endswith((".A_log", ".D", ".dt_bias"))
        assert torch.equal(rounded[name], tensor if wide else tensor.bfloat16()), name


def test_shards_in_and_out(tmp_path, monkeypatch):
    """Files as `save_pretrained` names them, none larger than asked unless one tensor is."""
    folder, whole = exported("llama, tied", tmp_path)
    student = loaded(folder)
    student.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert (tmp_path / "sharded" / saving.INDEX).exists()
    monkeypatch.setattr(saving, "SHARD", 20_000)
    target("native").write(tmp_path / "sharded", tmp_path / "out", Form("float32"))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    parts = [load_file(file) for file in files]
    assert all(len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 20_000 for part in parts)
    index = json.loads((tmp_path / "out" / saving.INDEX).read_text())
    assert index["weight_map"] == {name: file.name for file, part in zip(files, parts, strict=True) for name in part}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for part in parts for tensor in part.values())
    wanted = load_file(whole / "model.safetensors")
    assert all(torch.equal(wanted[name], tensor) for part in parts for name, tensor in part.items())
    plain(tmp_path / "out")


def test_adapters_are_merged(tmp_path):
    student = student_of("llama", "AMMM", {"M": ONE})
    adapters.add(student, list(adapters.targets(student, ["o_proj", "up_proj"])), 2, 4.0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    folder = saved(student, tmp_path / "student")
    assert (folder / adapters.CONFIG).exists()
    target("native").write(folder, tmp_path / "native", Form("float32"))
    assert not any(path.is_dir() or "adapter" in path.name for path in (tmp_path / "native").iterdir())
    assert furthest(student.eval(), plain(tmp_path / "native"), torch.randint(1, 320, (2, 19))) < EXACT


def test_a_run_ends_with_it(tiny_teacher, text_files, tmp_path):
    """Rehearsed at its beginning, written at its end, by its recipe."""
    entries = tiny_entries(tiny_teacher, text_files) | {"mixers": {"M": ONE}, "stages": [{"initialise": {"tokens": 64}}]}
    folder = distill.run(check(entries | {"export": ["native"]}, "here"), runs=tmp_path)
    out, exact = folder.path / "export" / "native", tmp_path / "exact"
    target("native").write(folder.student, exact, Form("float32"))
    written, exact = (load_file(place / "model.safetensors") for place in (out, exact))
    assert all(torch.equal(written[name], tensor.to(written[name].dtype)) for name, tensor in exact.items())
    tokens = [AutoTokenizer.from_pretrained(place)("He said so.").input_ids for place in (tiny_teacher, out)]
    assert tokens[0] == tokens[1]


def broken(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda found: found.pop("model.layers.1.self_attn.mixer.D"),
            "lack the tensor model.layers.1.self_attn.mixer.D",
        ),
        (lambda found: found.update(more=torch.zeros(1)), "hold an unknown tensor more"),
        (
            lambda found: found.update({"model.norm.weight": torch.zeros(3)}),
            r"model.norm.weight has shape \[3\], but .* \[32\]",
        ),
    ],
    ids=["missing", "unknown", "another shape"],
)
def test_weights_that_are_not_the_config_s_are_refused(change, said, tmp_path):
    folder = saved(student_of("llama", "AMMM", {"M": M}), tmp_path / "student")
    broken(folder, change)
    with pytest.raises(ValueError, match=said):
        target("native").write(folder, tmp_path / "native", Form())


def test_a_rehearsal_finds_what_the_class_would_not_load(tmp_path, tokenizer, monkeypatch):
    """With one tensor there, everything but the weights is written, and every name and shape is held against the class."""
    student = student_of("llama", "AMMM", {"M": M})
    student.save_pretrained(tmp_path / "student", state_dict={"model.norm.weight": torch.zeros(32)})
    tokenizer.save_pretrained(tmp_path / "student")
    native = target("native")
    native.rehearse(tmp_path / "student", tmp_path / "good", Form())
    assert not list((tmp_path / "good").glob("*.safetensors"))
    right = granite.GraniteMoeHybrid.tensors
    for name, change, said in (
        ("lost", lambda made: made.pop("model.norm.weight"), "needs a tensor model.norm.weight"),
        ("more", lambda made: made.update(extra=torch.zeros(1)), "has no tensor extra"),
        ("short", lambda made: made.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight has shape \[3\]"),
    ):

        def wrong(self, source, given, change=change):
            made = dict(right(self, source, given))
            change(made)
            return made

        monkeypatch.setattr(granite.GraniteMoeHybrid, "tensors", wrong)
        with pytest.raises(ValueError, match=said):
            native.rehearse(tmp_path / "student", tmp_path / name, Form())


def test_a_rewrite_loses_no_tensor():
    """One that nothing is made of would be left out in silence."""
    student = student_of("llama", "AMMM", {"M": M})
    source, tensors = Source.of(student.config), dict(student.state_dict())
    with pytest.raises(ValueError, match="student's tensor stray has no place"):
        container_of("GraniteMoeHybrid").tensors(source, tensors | {"stray": torch.zeros(1)})
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"no tensor model\.norm\.weight"):
        container_of("GraniteMoeHybrid").tensors(source, tensors)
