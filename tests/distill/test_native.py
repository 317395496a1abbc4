"""native: a class of transformers computes the same as the student; layouts that no class can hold are refused by name."""

import json
import shutil

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

from distill.exporters import engines, target
from distill.exporters.source import Source
from distill.exporters.target import Form
from tests.distill.random_students import loaded, saved, student_of

EXACT = 1e-4  # of logits, in float32
M = {"mixer": "mamba2"}
ONE = M | {"n_groups": 1}  # the same function in every supported transformers
LLAMA3 = {
    "rope_theta": 10000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.21,
    "logits_scaling": 1.7,
}
ZAMBA = {"M": M, "S": {"mixer": "shared_attention", "rank": 3}}
STUDENTS = {
    "llama, tied": ("llama", "AMMM", {"M": M}, {"tie_word_embeddings": True}),
    "llama, untied, attention first and last": ("llama", "AMMA", {"M": M}, {}),
    "llama, one group": ("llama", "MMAM", {"M": M | {"n_groups": 1, "expand": 1}}, {}),
    "llama, two groups, wide state, three taps": (
        "llama",
        "MAMM",
        {"M": M | {"n_groups": 2, "d_state": 12, "d_conv": 3}},
        {},
    ),
    "llama, expand 1, one tap": ("llama", "AMMM", {"M": M | {"expand": 1, "d_conv": 1}}, {}),
    "llama 3's rope": ("llama", "AMMM", {"M": ONE}, {"rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", "AMMM", {"M": M}, {"rope_parameters": YARN}),
    "llama, heads of their own width": ("llama", "AMMM", {"M": M}, {"head_dim": 16}),
    "llama, narrow heads, filled up": ("llama", "AMMM", {"M": M | {"expand": 1}}, {"head_dim": 6, "hidden_size": 36}),
    "llama, all biases": ("llama", "AMMM", {"M": M}, {"attention_bias": True}),
    "llama, attention as a mixer": ("llama", "WMMM", {"M": M | {"d_conv": 6}, "W": {"mixer": "attention"}}, {}),
    "llama, no rope": ("llama", "WMMM", {"M": M, "W": {"mixer": "attention", "rope": False}}, {}),
    "qwen2": ("qwen2", "AMMM", {"M": M}, {"tie_word_embeddings": True}),
    "qwen2, windows in converted layers": (
        "qwen2",
        "AMMM",
        {"M": ONE},
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
    ),
    "granite": ("granite", "AMMM", {"M": M}, GRANITE),
    "granite, tied, biases": (
        "granite",
        "AMMM",
        {"M": ONE},
        GRANITE | {"tie_word_embeddings": True, "attention_bias": True},
    ),
    "mistral": ("mistral", "AMMM", {"M": M}, {"sliding_window": None, "head_dim": 8}),
    "mistral, a window that never bites": ("mistral", "AMMM", {"M": ONE}, {"sliding_window": 256}),
    "smollm3": ("smollm3", "AMMM", {"M": M}, {"no_rope_layers": [1, 0, 1, 0]}),
    "smollm3, all kept without rope": ("smollm3", "AMMM", {"M": M}, {"no_rope_layers": [0, 1, 1, 1]}),
    "zamba": ("llama", "MSMS", ZAMBA, {}),
    "zamba, two blocks, biases": (
        "qwen2",
        "SSSM",
        {"M": M, "S": {"mixer": "shared_attention", "rank": 2, "blocks": 2}},
        {},
    ),
    "zamba without deltas": ("llama", "MSMS", {"M": ONE, "S": {"mixer": "shared_attention", "rank": 0}}, {}),
    "mixtral": ("mixtral", "AMMM", {"M": M}, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, one of three": ("mixtral", "MMMA", {"M": ONE}, {"num_local_experts": 3, "num_experts_per_tok": 1}),
}


def exported(name, place, dtype="float32", tokenizer=None):
    family, pattern, mixers, entries = STUDENTS[name]
    student = student_of(family, pattern, mixers, **entries)
    folder = saved(student, place / "student", tokenizer)
    target("native").write(folder, place / "native", Form(dtype))
    return folder, place / "native"


def plain(folder):
    """What anyone loads: no code of ours, no remote code, every tensor found and none left over."""
    from transformers import AutoModelForCausalLM

    model, said = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model).__module__.startswith("transformers.models.")
    assert not any(said[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def furthest(student, model, ids):
    """The largest difference of logits: of whole texts, token by token behind a cache, and padded on the left."""
    wanted = student(ids).logits
    begun, steps = model(ids[:, :7], use_cache=True), []
    cache = next(part for name in ("past_key_values", "cache") if (part := begun.get(name)) is not None)
    for position in range(7, ids.shape[1]):
        steps.append(model(ids[:, position : position + 1], past_key_values=cache).logits)
    padded = torch.cat([torch.full((len(ids), 3), 5), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    left = model(padded, attention_mask=mask).logits[:, 3:]
    assert wanted.std() > 0.1
    found = (model(ids).logits, torch.cat([begun.logits, *steps], 1), left)
    return max((logits - wanted).abs().max().item() for logits in found)


@pytest.mark.matrix
@pytest.mark.parametrize("name", STUDENTS)
def test_it_is_the_same_function(name, tmp_path):
    """In transformers before 5.23 a norm over groups is another function, and the container says so."""
    folder, out = exported(name, tmp_path)
    difference, source = furthest(loaded(folder), plain(out), torch.randint(1, 320, (2, 19))), Source.read(folder)
    since = target("native").since(source)
    assert (since == "5.23") == (json.loads((out / "config.json").read_text())["mamba_n_groups"] > 1)
    reason = target("native").engines(source)["transformers"]
    print(f"{name}: {difference:.1e}")
    if since and Version(transformers.__version__) < Version(since):
        assert difference > EXACT and "5.23" in reason
    else:
        assert difference < EXACT and reason is None


@pytest.fixture(scope="module")
def zamba(tmp_path_factory):
    """A student with every kind of tensor and multipliers: its logits on some ids, and its native folder."""
    place = tmp_path_factory.mktemp("zamba")
    student = student_of("granite", "MSMS", {**ZAMBA, "M": ONE}, **GRANITE, attention_bias=True)
    target("native").write(saved(student, place / "student"), place / "native", Form("float32"))
    ids = torch.randint(1, 320, (2, 19))
    with torch.no_grad():
        return ids, student.eval()(ids).logits, place / "native"


@torch.no_grad()
def off(ids, wanted, folder):
    return (plain(folder)(ids).logits - wanted).abs().max().item()


@pytest.mark.parametrize("name", [*GRANITE, "rms_norm_eps", "position_embedding_type"])
def test_a_wrong_entry_is_another_function(name, zamba, tmp_path):
    ids, wanted, right = zamba
    folder = shutil.copytree(right, tmp_path / "native")
    assert off(ids, wanted, folder) < EXACT
    entries = json.loads((folder / "config.json").read_text())
    wrong = "nope" if name == "position_embedding_type" else entries[name] * 1.1 + 1e-3
    (folder / "config.json").write_text(json.dumps(entries | {name: wrong}))
    assert off(ids, wanted, folder) > 10 * EXACT


MAMBA = ("conv1d.bias", "dt_bias", "A_log", "D", "norm.weight", "mamba.out_proj.bias")


@pytest.mark.parametrize("part", [*MAMBA, "v_proj.bias", "o_proj.weight", "input_linear.weight"])
def test_a_wrong_weight_is_another_function(part, zamba, tmp_path):
    ids, wanted, right = zamba
    folder = shutil.copytree(right, tmp_path / "native")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(part))
    tensors[name] = tensors[name].roll(1, 0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert off(ids, wanted, folder) > 10 * EXACT


REFUSED = {
    "another family": ("qwen3", "AMMM", {"M": M}, {"head_dim": 8}, "this class lacks the norms on q and k of qwen3"),
    "another mixer": (
        "llama",
        "AMMM",
        {"M": {"mixer": "discrete_mamba2"}},
        {},
        "mixers.M: the class has no discrete_mamba2, only mamba2",
    ),
    "a window branch": (
        "llama",
        "AMMM",
        {"M": M | {"window": {"size": 4}}},
        {},
        "mixers.M.window: the class has no window in a Mamba-2 layer",
    ),
    "a lag": ("llama", "AMMM", {"M": M | {"lag": 4}}, {}, "mixers.M.lag is 4: the class's Mamba-2 has no lag"),
    "no attention": ("llama", "MMMM", {"M": M}, {}, "no layer has attention"),
    "no mamba": ("llama", "AWAA", {"W": {"mixer": "attention"}}, {}, "no layer has mamba2"),
    "a window": (
        "llama",
        "WMMM",
        {"M": M, "W": {"mixer": "attention", "window": 8}},
        {},
        "mixers.W.window is 8, of 256 positions",
    ),
    "a shared window": (
        "llama",
        "MSMS",
        {"M": M, "S": {"mixer": "shared_attention", "window": 8}},
        {},
        "mixers.S.window is 8, of 256 positions",
    ),
    "the teacher's window": ("mistral", "AMMM", {"M": M}, {"sliding_window": 8}, "the teacher's sliding_window is 8"),
    "a window in one kept layer": (
        "qwen2",
        "AMMA",
        {"M": M},
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
        "the teacher's sliding_window is 8",
    ),
    "rope here and there": (
        "smollm3",
        "AAMM",
        {"M": M},
        {"no_rope_layers": [1, 0, 1, 0]},
        "layers 1 have attention without rotary",
    ),
    "biases of the MLP": ("llama", "AMMM", {"M": M}, {"mlp_bias": True}, "mlp_bias"),
    "another activation": ("llama", "AMMM", {"M": M}, {"hidden_act": "gelu"}, "hidden_act is gelu"),
    "dynamic rope": (
        "llama",
        "AMMM",
        {"M": M},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope scaling dynamic",
    ),
    "shared keys": (
        "llama",
        "WVMM",
        {"M": M, "W": {"mixer": "attention"}, "V": {"mixer": "attention", "share_kv": True}},
        {},
        "mixers.V.share_kv",
    ),
    "two kinds of mamba2": ("llama", "AMNM", {"M": M, "N": ONE}, {}, "mixers M and N: all Mamba-2 layers"),
    "groups that fill nothing": ("llama", "AMMM", {"M": ONE | {"expand": 1}}, {"head_dim": 6}, "mixers.M.n_groups"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_hold_is_refused_by_name(name, tmp_path):
    family, pattern, mixers, entries, reason = REFUSED[name]
    student = student_of(family, pattern, mixers, **entries)
    said = target("native").refuses(Source.of(student.config))
    assert "GraniteMoeHybrid (" in said and reason in said
    with pytest.raises(ValueError, match="native cannot hold this student"):
        target("native").write(saved(student, tmp_path / "student"), tmp_path / "native", Form())


def test_meta_tokens_are_refused():
    student = student_of("llama", "AMMM", {"M": M}, meta_tokens=3)
    assert "meta_tokens is 3" in target("native").refuses(Source.of(student.config))


WIDE = "it takes heads of 8 channels (hidden / heads), but the student's have 16"
ENGINES = {
    "one group": ({"M": ONE}, {}, {"llama.cpp": "it reads GGUF"}),
    "groups": ({"M": M}, {}, {"llama.cpp": "it reads GGUF", "mlx": "not over 4 groups"}),
    "wide heads": (
        {"M": ONE},
        {"head_dim": 16},
        {"llama.cpp": "needs an inner width of 64"} | dict.fromkeys(("vllm", "mlx"), WIDE),
    ),
    "wide heads, the usual inner width": (
        {"M": ONE | {"expand": 1}},
        {"head_dim": 16},
        {"llama.cpp": "it reads GGUF"} | dict.fromkeys(("vllm", "mlx"), WIDE),
    ),
    "many taps": ({"M": ONE | {"d_conv": 9}}, {}, {"vllm": "at most 5 taps", "llama.cpp": "it reads GGUF"}),
    "rope": (
        {"M": ONE},
        {"rope_parameters": LLAMA3},
        {"llama.cpp": "it reads GGUF", "mlx": "it ignores the rope scaling llama3"},
    ),
    "yarn": (
        {"M": ONE},
        {"rope_parameters": YARN},
        {"llama.cpp": "it reads GGUF", "mlx": "it ignores the rope scaling yarn"},
    ),
    "biases": ({"M": ONE}, {"attention_bias": True}, {"llama.cpp": "no bias in Mamba-2's projections"}),
}


@pytest.mark.parametrize("name", ENGINES)
def test_engines_say_why_not(name):
    mixers, entries, expected = ENGINES[name]
    found = target("native").engines(Source.of(student_of("llama", "AMMM", mixers, **entries).config))
    assert list(found) == list(engines.ENGINES) and {engine for engine, why in found.items() if why} == expected.keys()
    assert all(expected[engine] in found[engine] for engine in expected)
