"""A student without swapped layers, or with plain attention swapped in, is its teacher; differences are named."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import teachers
from distill.build import build
from distill.errors import UserError
from distill.evaluation.identity import check_identity
from students.config import Layout
from tests.teachers.tiny import EVERY, supported, tiny_model, tiny_teacher

SWAPPED = Layout.over(2, "M", {"M": {"mixer": "discrete_mamba2"}})


@pytest.mark.parametrize("name", EVERY)
def test_every_family_is_itself(name):
    found = check_identity(tiny_teacher(name), SWAPPED)
    assert found["logits"] < 1e-5 and found["attention"] < 1e-4 and found["layer"] in (0, 1)


def test_the_real_teacher(smollm2):
    kept = {0, 6, 7}
    layout = Layout("".join("A" if layer in kept else "M" for layer in range(30)), {"M": {"mixer": "mamba2"}})
    found = check_identity(smollm2, layout)
    assert found["logits"] < 1e-5 and found["attention"] < 1e-4 and found["layer"] not in kept


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("smollm2-135m-instruct", {"rope": "pairs"}),
        ("qwen3-0.6b", {"norm": "layer"}),
        ("qwen3-0.6b", {"norm_offset": 1.0}),
        ("qwen3-0.6b", {"norms": ("q_layernorm", "k_layernorm")}),
        ("phi-1_5", {"qkv": ("q_proj", "v_proj", "k_proj")}),
        ("pythia-160m", {"packing": "stacked"}),
        ("stablelm-2-12b", {"documents": "keywords"}),
    ],
    ids=str,
)
def test_a_row_that_says_something_else_is_caught(name, row):
    teacher = tiny_teacher(name)
    teacher = replace(teacher, family=replace(teacher.family, **row))
    with pytest.raises(UserError, match=rf"layer 0 of {name} with plain attention in its place differs"):
        check_identity(teacher, SWAPPED)


def test_a_layer_that_is_another_is_named(monkeypatch):
    teacher = tiny_teacher("smollm2-135m-instruct")

    def other(teacher, layout):
        student, transfers = build(teacher, layout)
        up = student.model.layers[1].mlp.up_proj
        up.weight = torch.nn.Parameter(up.weight + 1.0)
        return student, transfers

    monkeypatch.setattr("distill.evaluation.identity.build", other)
    with pytest.raises(UserError, match=r"with nothing swapped is not its teacher: layer 1 differs"):
        check_identity(teacher, SWAPPED)


def test_a_head_that_is_another_is_named(monkeypatch):
    def other(teacher, layout):
        student, transfers = build(teacher, layout)
        student.lm_head.weight = torch.nn.Parameter(torch.randn_like(student.lm_head.weight))
        return student, transfers

    monkeypatch.setattr("distill.evaluation.identity.build", other)
    with pytest.raises(UserError, match="the final norm or the output head differs"):
        check_identity(tiny_teacher("smollm2-135m-instruct"), SWAPPED)


# What the check finds by itself, where whatever else would have refused it is switched off.


def loaded(model, tokenizer, folder, **tensors):
    """The teacher in a model's folder, to whose files some tensors were added."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})
    return teachers.load(str(folder))


def test_a_head_that_is_tied_again_is_found(tokenizer, tmp_path, monkeypatch):
    model = tiny_model("smollm2-135m-instruct", vocab_size=384)
    monkeypatch.setattr(teachers, "keep_own_head", lambda model: None)
    teacher = loaded(model, tokenizer, tmp_path, **{"lm_head.weight": torch.randn(384, 48)})
    with pytest.raises(UserError, match="the final norm or the output head differs"):
        check_identity(teacher, SWAPPED)


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("smollm2-135m-instruct", {f"model.layers.1.self_attn.{part}_proj.bias": 48 for part in "qo"}),
        ("smollm2-135m-instruct", {"model.layers.0.mlp.up_proj.weight_scale_inv": 1}),
        ("smollm2-135m-instruct", {"model.layers.2.mlp.up_proj.weight": 3072}),
        ("mixtral-8x7b-v0.1", {"model.layers.1.self_attn.q_proj.bias": 48}),
        ("gpt2", {"transformer.h.0.attn.extra": 1}),
    ],
    ids=["biases", "scales", "a layer", "biases, of a model whose tensors are joined", "anything"],
)
def test_tensors_that_were_dropped_are_found(name, tensors, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "check_weights", lambda *unused: [])
    model = tiny_model(name, vocab_size=384)
    check_identity(loaded(model, tokenizer, tmp_path / "whole"), SWAPPED)
    teacher = loaded(model, tokenizer, tmp_path / "more", **{name: torch.ones(size) for name, size in tensors.items()})
    named = "" if model.config.model_type == "mixtral" else min(tensors)  # whose other tensors have other names in the files
    with pytest.raises(UserError, match=re.escape(f"is not what its files hold: {named}")):
        check_identity(teacher, SWAPPED)


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "olmo-2-0425-1b", "cohere"])
def test_a_window_that_nobody_reads_is_found(name, monkeypatch):
    """However wide it is: the check narrows it, for the teacher too."""
    teacher = tiny_teacher("aya-23-8b" if name == "cohere" else name)
    teacher.config.sliding_window = 4096
    assert check_identity(teacher, SWAPPED)["attention"] < 1e-4 and teacher.config.sliding_window == 4096
    monkeypatch.setattr("teachers.teacher.knows_windows", lambda slot: True)
    with pytest.raises(UserError, match=r"layer 0 of .* with plain attention in its place differs"):
        check_identity(teacher, SWAPPED)


def test_a_window_that_a_row_loses_is_found(monkeypatch):
    teacher = tiny_teacher("mistral-7b-v0.1", sliding_window=64)
    monkeypatch.setattr("teachers.teacher.knows_windows", lambda slot: False)
    with pytest.raises(UserError, match=r"layer 0 of .* with plain attention in its place differs"):
        check_identity(teacher, SWAPPED)


def test_an_adapter_on_the_teacher_is_found(tokenizer, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    model = tiny_model("smollm2-135m-instruct", vocab_size=384)
    model.save_pretrained(tmp_path)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has an adapter beside it"):
        teachers.load(str(tmp_path))
    monkeypatch.setattr(teachers, "check_adapter_files", lambda *unused: None)
    with pytest.raises(ValueError, match="was loaded with an adapter"):
        teachers.load(str(tmp_path))
    monkeypatch.setattr(teachers, "check_weights", lambda *unused: [])
    teacher = teachers.load(str(tmp_path))
    with pytest.raises(UserError, match=r"is not what its files hold"):
        check_identity(teacher, SWAPPED)
    with pytest.raises(UserError, match=r"_proj\.weight of a student of .* has no value"):
        check_identity(replace(teacher, folder=None), SWAPPED)


@pytest.mark.parametrize("name", ["gpt2", "granite-3.1-2b-base", *["falcon-7b"] * supported("falcon")])
def test_a_layer_that_drops_out_is_found(name, monkeypatch):
    teacher = tiny_teacher(name, attention_dropout=0.3, resid_pdrop=0.3, hidden_dropout=0.3)
    assert check_identity(teacher, SWAPPED)["logits"] < 1e-5
    monkeypatch.setattr("distill.evaluation.identity.recompute_layers", lambda student, options: student.train())
    with pytest.raises(UserError, match="with nothing swapped is not its teacher: layer 0 differs"):
        check_identity(teacher, SWAPPED)


def test_a_teacher_that_drops_out_is_found():
    teacher = tiny_teacher("granite-3.1-2b-base", attention_dropout=0.3)
    teacher.model.train()
    with pytest.raises(UserError, match="with nothing swapped is not its teacher: layer 0 differs"):
        check_identity(teacher, SWAPPED)


def test_what_was_given_no_value_is_named(monkeypatch):
    teacher = tiny_teacher("smollm2-135m-instruct")
    weights = teacher.model.state_dict
    monkeypatch.setattr(
        teacher.model, "state_dict", lambda: {name: part for name, part in weights().items() if "0.mlp.up" not in name}
    )
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj\.weight of a student of .* has no value"):
        build(teacher, SWAPPED)
