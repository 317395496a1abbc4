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
from tests.distill.native_students import EXACT, GRANITE, LLAMA3, ONE, STUDENTS, YARN, ZAMBA, M, exported, furthest, plain
from tests.distill.random_students import loaded, saved, student_of


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
