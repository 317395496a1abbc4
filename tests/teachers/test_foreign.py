"""Checkpoints that are no plain model: quantised weights and adapters, by their configs, their files and their tensors."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import teachers
from distill.build import build
from distill.errors import UserError
from distill.loading import teacher_config
from distill.recipe_file import check
from students.config import Layout
from teachers.files import stored_tensors
from tests.teachers.tiny import tiny_model

NAME = "smollm2-135m-instruct"


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A tiny model's folder."""
    tiny_model(NAME, vocab_size=384).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def change(folder, config=None, weights=None, without=()):
    """Change entries of a folder's config and tensors of its file."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in without} | (weights or {})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}
UP = "model.layers.1.mlp.up_proj"
# by method: its entry in config.json, and some of its tensors
QUANTISED = {
    "bitsandbytes": (BITS, {f"{UP}.weight": torch.zeros(1536, 1, dtype=torch.uint8), f"{UP}.weight.absmax": torch.ones(48)}),
    "bitsandbytes, 8 bits": (
        {"load_in_8bit": True},
        {f"{UP}.weight": torch.ones(64, 48, dtype=torch.int8), f"{UP}.SCB": torch.ones(64)},
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {f"{UP}.qweight": torch.zeros(8, 16, dtype=torch.int32), f"{UP}.g_idx": torch.zeros(8, 16, dtype=torch.int32)},
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "version": "gemm"},
        {f"{UP}.qweight": torch.zeros(8, 16, dtype=torch.int32), f"{UP}.qzeros": torch.zeros(8, 16, dtype=torch.int32)},
    ),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {f"{UP}.weight": torch.ones(64, 48).to(torch.float8_e4m3fn), f"{UP}.weight_scale_inv": torch.ones(1, 1)},
    ),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors"},
        {f"{UP}.weight_packed": torch.zeros(8, 16, dtype=torch.int32)},
    ),
    "hqq": ({"quant_method": "hqq"}, {f"{UP}.W_q": torch.zeros(8, 16, dtype=torch.int32)}),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_config_that_says_its_weights_are_quantised(folder, tiny_recipe, name):
    """One message for `run` and for `plan`, before anything is loaded, whatever is installed."""
    entry, tensors = QUANTISED[name]
    change(folder, {"quantization_config": entry}, tensors)
    said = (
        rf"is quantised by {name.partition(',')[0]} \(quantization_config in its config.json\); load the model that it was"
    )
    with pytest.raises(ValueError, match=said):
        teachers.load(str(folder))
    with pytest.raises(UserError, match=said):
        teacher_config(check(tiny_recipe | {"teacher": str(folder)}, "x"))


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_without_a_word_in_the_config(folder, name):
    """Of one projection alone: what is stored says so."""
    change(folder, weights=QUANTISED[name][1], without=[] if f"{UP}.weight" in QUANTISED[name][1] else [f"{UP}.weight"])
    with pytest.raises(ValueError, match=rf"has quantised weights: .*{UP}\..*; load the model that it was made from"):
        teachers.load(str(folder))


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32, torch.bool], ids=str)
def test_weights_that_are_no_floating_numbers(folder, kind):
    """transformers would take whole numbers as they stand."""
    name = "model.layers.0.self_attn.k_proj.weight"
    change(folder, weights={name: load_file(folder / "model.safetensors")[name].to(kind)})
    with pytest.raises(ValueError, match=rf"has quantised weights: {name} is stored as [A-Z0-9]+; load the model"):
        teachers.load(str(folder))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_weights_in_every_plain_type(folder, kind):
    tensors = {name: tensor.to(kind) for name, tensor in load_file(folder / "model.safetensors").items()}
    change(folder, weights=tensors)
    found = teachers.load(str(folder)).model.state_dict()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in tensors.items())


def test_a_config_left_over_from_a_training_in_4_bits(folder):
    """The weights are plain: they are what is read, and what the student is made from says nothing of 4 bits."""
    change(folder, {"quantization_config": BITS})
    teacher = teachers.load(str(folder))
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in teacher.model.state_dict().items() if name in stored)
    student, _ = build(teacher, Layout("AA"))
    assert "quantization_config" not in student.config.to_dict()


@pytest.mark.parametrize(
    ("name", "card", "named"),
    [
        ("Model-7B-GPTQ", None, " (Model-7B, by its name)"),
        ("Model-1B-Instruct-bnb-4bit", None, " (Model-1B-Instruct, by its name)"),
        ("model-awq-w4a16", None, " (model, by its name)"),
        ("model-7b", "---\nlicense: mit\nbase_model:\n- org/Model-7B\n---\n", " (org/Model-7B, by its name)"),
        ("model-7b-GPTQ", '---\nbase_model: "org/model"\n---\n', " (org/model, by its name)"),
        ("model-7b", None, ""),
    ],
)
def test_the_message_names_what_to_load(folder, tmp_path_factory, name, card, named):
    change(folder, {"quantization_config": BITS}, QUANTISED["bitsandbytes"][1])
    if card:
        (folder / "README.md").write_text(card)
    place = folder.rename(tmp_path_factory.mktemp("models") / name)
    with pytest.raises(ValueError, match=re.escape(f"the model that it was made from{named}, or a GGUF file of it")):
        teachers.load(str(place))


# adapters


@pytest.mark.parametrize(
    "file",
    [
        *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors"),
        *("adapters.safetensors", "adapters.npz", "pytorch_adapter.bin"),
    ],
)
def test_adapters_beside_the_weights(folder, file):
    (folder / file).write_bytes(b"{}")
    with pytest.raises(ValueError, match=rf"has an adapter beside it: .*{file}; merge it"):
        teachers.load(str(folder))


@pytest.mark.parametrize(
    "method",
    ["LoraConfig", "DoRA", "IA3Config", "LoHaConfig", "LoKrConfig", "VeraConfig", "OFTConfig"],
)
def test_adapters_in_the_weights(folder, method):
    """A whole model as its training saw it, saved with what peft put into it."""
    import peft

    targets = {"target_modules": ["q_proj", "up_proj"]}
    if method == "DoRA":
        config = peft.LoraConfig(r=2, use_dora=True, **targets)
    elif method == "IA3Config":
        config = peft.IA3Config(feedforward_modules=["up_proj"], **targets)
    elif method == "OFTConfig":
        config = peft.OFTConfig(r=0, oft_block_size=4, **targets)
    else:
        config = getattr(peft, method)(r=2, **targets)
    adapted = peft.get_peft_model(tiny_model(NAME, vocab_size=384), config)
    held = {name: tensor.clone() for name, tensor in adapted.base_model.model.state_dict().items() if "lm_head" not in name}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has an adapter in its weights: .*; merge it"):
        teachers.load(str(folder))


def test_an_adapter_alone_names_its_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"}))
    with pytest.raises(ValueError, match="holds an adapter of org/base and no model: merge the two"):
        teachers.load(str(tmp_path))


# shards and heads


def sharded(folder, change=lambda places: None, second=None):
    """The folder's file in two, and an index of them, changed."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    if second:
        save_file({name: tensors[name] for name in names[1::2]} | second, folder / file, metadata={"format": "pt"})
    places = {name: file for file, held in parts.items() for name in held}
    change(places)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_shards(folder):
    whole = stored_tensors(str(folder))
    sharded(folder)
    assert stored_tensors(str(folder)) == whole
    teachers.load(str(folder)).check_account()


def test_an_index_that_names_a_tensor_nobody_has(folder):
    sharded(folder, lambda places: places.update({f"{UP}.bias": "model-00002-of-00002.safetensors"}))
    teacher = teachers.load(str(folder))  # it is in no file, so nothing is lost
    assert not hasattr(teacher.model.model.layers[1].mlp.up_proj.bias, "shape")
    teacher.check_account()


def test_a_tensor_that_an_index_leaves_out(folder):
    """It is read from its file all the same, and counts."""
    sharded(folder, lambda places: places.pop(f"{UP}.weight"))
    wanted = stored_tensors(str(folder))
    assert f"{UP}.weight" in wanted
    teachers.load(str(folder)).check_account()


def test_a_tensor_without_a_place_in_a_shard(folder):
    sharded(folder, second={f"{UP}.bias": torch.ones(64)})
    with pytest.raises(ValueError, match=rf"no place for {UP}\.bias of its files"):
        teachers.load(str(folder))


def test_a_head_of_its_own_where_nothing_is_tied(tokenizer, tmp_path):
    model = tiny_model(NAME, vocab_size=384, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    teacher = teachers.load(str(tmp_path))
    head, embeddings = teacher.model.get_output_embeddings().weight, teacher.model.get_input_embeddings().weight
    assert head is not embeddings and torch.equal(head, model.lm_head.weight)
    change(tmp_path, without=["lm_head.weight"])
    with pytest.raises(ValueError, match=r"there are no weights for lm_head\.weight"):
        teachers.load(str(tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_saved_by_its_head_alone(folder, tied):
    """Some savers keep the head of two tied tensors: both are it where the config ties them, else one is missing."""
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    tensors = {"lm_head.weight": embeddings}
    change(folder, {"tie_word_embeddings": tied}, tensors, without=["model.embed_tokens.weight"])
    if not tied:
        with pytest.raises(ValueError, match=r"there are no weights for model\.embed_tokens\.weight"):
            teachers.load(str(folder))
        return
    teacher = teachers.load(str(folder))
    assert torch.equal(teacher.model.get_input_embeddings().weight, embeddings)
    assert torch.equal(teacher.model.get_output_embeddings().weight, embeddings)
    teacher.check_account()
