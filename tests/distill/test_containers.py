"""The containers for Qwen3 with gated DeltaNet and for Hymba-lite: random students, exported and loaded without our code."""

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

from distill.exporters import target
from distill.exporters.containers import fitting
from distill.exporters.source import Source
from distill.exporters.target import Form
from distill.recipe_file import load
from tests.distill.native_students import EXACT, LLAMA3, YARN, furthest, plain
from tests.distill.random_students import loaded, saved, student_of

DELTA = {"M": {"mixer": "gated_deltanet"}}
BATCHES = Version(transformers.__version__) >= Version("5.23")  # Falcon-H1 decodes them
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
TEXT = "qwen3_5_text"
ENDS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def lite(*, norm=False, **ssm):
    return {"P": {"mixer": "parallel_heads", "norm": norm, "ssm": {"mixer": "mamba2", **ssm}}}


QWEN = {
    "AMMM, tied": ("AMMM", DELTA, {"tie_word_embeddings": True}),
    "MMMA": ("MMMA", DELTA, {"num_hidden_layers": 8}),
    "MA, wide heads": ("MA", DELTA, {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "MAM, yarn": ("MAM", DELTA, {"rope_parameters": YARN}),
    "llama3 rope, own width": ("MA", DELTA, {"rope_parameters": LLAMA3, "head_dim": 12}),
    "linear rope": ("MMA", DELTA, {"rope_parameters": LINEAR}),
    "a window that never bites": (
        "MMMA",
        DELTA,
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 256},
    ),
    "windows in converted layers": (
        "AMMM",
        DELTA,
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
    ),
    "taps": ("MNA", {"M": {"mixer": "gated_deltanet", "d_conv": 2}, "N": {"mixer": "gated_deltanet", "d_conv": 6}}, {}),
}
FALCON = {
    "Llama, tied": ("llama", "P", lite(), {"tie_word_embeddings": True}),
    "expand 1, two groups": ("llama", "P", lite(expand=1, n_groups=2, d_state=12), {}),
    "one group, biases": ("llama", "P", lite(n_groups=1, d_conv=3), {"mlp_bias": True, "attention_bias": True}),
    "llama3 rope": ("llama", "P", lite(n_groups=1), {"rope_parameters": LLAMA3, "head_dim": 12}),
    "Qwen2": ("qwen2", "P", lite(n_groups=4), {"tie_word_embeddings": True}),
    "Mistral": ("mistral", "P", lite(expand=1), {"sliding_window": None, "head_dim": 8}),
    "taps": ("llama", "PQ", lite(d_conv=2) | {"Q": lite(d_conv=5)["P"]}, {}),
}


def sample(table):
    """Every third in each run of the tests, all of them in the matrix."""
    return [name if place % 3 == 0 else pytest.param(name, marks=pytest.mark.matrix) for place, name in enumerate(table)]


def exported(student, place):
    folder = saved(student, place / "student")
    target("native").write(folder, place / "native", Form("float32"))
    return loaded(folder), place / "native"


@torch.no_grad()
def check_same(student, out, name, rows=2):
    model, ids = plain(out), torch.randint(1, 320, (rows, 19))
    difference = furthest(student, model, ids)
    print(f"{name}: {difference:.1e}")
    assert difference < EXACT
    padded = torch.cat([torch.zeros(rows, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 5).long().expand_as(padded)
    tokens = student.generate(ids, **ENDS)
    assert torch.equal(model.generate(ids, **ENDS), tokens)
    assert torch.equal(model.generate(padded, attention_mask=mask, **ENDS)[:, 5:], tokens)


@pytest.mark.parametrize("name", sample(QWEN))
def test_a_qwen3_student_is_the_same_in_qwen35(name, tmp_path):
    pattern, mixers, changes = QWEN[name]
    check_same(*exported(student_of("qwen3", pattern, mixers, **{"head_dim": 8, **changes}), tmp_path), name)


@pytest.mark.parametrize("name", sample(FALCON))
def test_a_hymba_lite_student_is_the_same_in_falcon_h1(name, tmp_path):
    family, pattern, mixers, changes = FALCON[name]
    student = student_of(family, pattern, mixers, num_hidden_layers=3, **changes)
    check_same(*exported(student, tmp_path), name, 2 if BATCHES else 1)


@pytest.mark.parametrize(
    ("family", "pattern", "mixers", "wrong", "factor"),
    [
        ("qwen3", "MA", DELTA, "layers.1.self_attn.o_proj", 0.5),
        ("qwen3", "MA", DELTA, "layers.1.self_attn.q_norm", 1.01),
        ("qwen3", "MA", DELTA, "layers.0.linear_attn.norm", 1.01),
        ("llama", "P", lite(), "layers.0.mamba.norm", 2.0),
        ("llama", "P", lite(), "layers.1.self_attn.o_proj", 1.01),
    ],
)
def test_a_wrong_factor_is_seen(family, pattern, mixers, wrong, factor, tmp_path):
    student, out = exported(student_of(family, pattern, mixers, num_hidden_layers=2, head_dim=8), tmp_path)
    tensors = load_file(out / "model.safetensors")
    tensors[f"model.{wrong}.weight"] *= factor
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    assert furthest(student, plain(out), torch.randint(1, 320, (1, 19))) > 3 * EXACT


def test_mlx_is_told_the_class_where_its_interval_is_the_layout(tmp_path):
    """Elsewhere nothing names it, so that MLX refuses the folder in place of running other layers."""
    for pattern, layers, every in (("MMMA", 8, 4), ("MA", 4, 2), ("MMMA", 6, 4), ("AMMM", 8, None), ("MMAMMMMA", 8, None)):
        student = student_of("qwen3", pattern, DELTA, head_dim=8, num_hidden_layers=layers)
        source = Source.of(student.config)
        container = fitting(source).container
        entries, mlx = container.config(source), container.engines(source)["mlx"]
        assert entries.get("full_attention_interval") == every and (mlx is None) == bool(every)
        assert list(container.files(source)) == ([entries["model_file"]] if every else []) and entries["model_type"] == TEXT
        assert "model_file" in entries or not every
        kept = [kind == "full_attention" for kind in entries["layer_types"]]
        assert kept == [letter == "A" for letter in source.layout.pattern]


def test_the_teachers_tokenizer_stays(tmp_path):
    """Words with combining marks: Qwen3.5's own tokenizer takes a mark to the letter before it, Qwen3's does not."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoTokenizer, Qwen2Tokenizer

    word = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("\u0928\u093f")[0][0]
    pairs = [(word[0], word[1]), (word[:2], word[2]), (word[3:5], word[5]), (word[:3], word[3:])]
    tokens = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    tokenizer = Qwen2Tokenizer(vocab={token: place for place, token in enumerate(tokens)}, merges=pairs)
    student = student_of("qwen3", "MA", DELTA, head_dim=8, num_hidden_layers=2)
    target("native").write(saved(student, tmp_path / "student", tokenizer), tmp_path / "native", Form("float32"))
    wanted = tokenizer("\u0928\u093f").input_ids
    assert len(wanted) == 2 and AutoTokenizer.from_pretrained(tmp_path / "native")("\u0928\u093f").input_ids == wanted


def of(family, pattern="MA", mixers=DELTA, meta_tokens=0, **changes):
    changes = {"num_hidden_layers": 2, **({"head_dim": 8} if family.startswith("qwen3") else {}), **changes}
    return Source.of(student_of(family, pattern, mixers, meta_tokens=meta_tokens, **changes).config)


WINDOWS = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
REFUSED = {
    "Llama with delta layers": (("llama",), {}, "Qwen3.5", "the teacher is a llama model"),
    "another mixer": (("qwen3", "MA", {"M": {"mixer": "mamba2"}}), {}, "Qwen3.5", "mixers.M.mixer is mamba2"),
    "a window beside": (
        ("qwen3", "MA", {"M": {"mixer": "gated_deltanet", "window": {"size": 4}}}),
        {},
        "Qwen3.5",
        "mixers.M.window: this class has no window in a layer with a state",
    ),
    "no attention": (("qwen3", "M"), {}, "Qwen3.5", "the pattern keeps no attention"),
    "meta tokens": (("qwen3", "MA", DELTA, 3), {}, "Qwen3.5", "meta_tokens is 3"),
    "biases": (("qwen3",), {"attention_bias": True}, "Qwen3.5", "the teacher's attention has biases (q, k and v and o)"),
    "teacher's windows": (("qwen3",), WINDOWS, "Qwen3.5", "sees 8 of its 256 positions in layer 1 (sliding_window)"),
    "dynamic rope": (("qwen3",), {"rope_parameters": DYNAMIC}, "Qwen3.5", "of type dynamic, which changes with the length"),
    "another activation": (("qwen3",), {"hidden_act": "gelu"}, "Qwen3.5", "the teacher's activation is gelu"),
    "norms": (("llama", "P", lite(norm=True)), {}, "Falcon-H1", "mixers.P.norm is true"),
    "norms by default": (("llama", "P", {"P": {"mixer": "parallel_heads"}}), {}, "Falcon-H1", "mixers.P.norm is true"),
    "another SSM": (
        ("llama", "P", {"P": {"mixer": "parallel_heads", "norm": False}}),
        {},
        "Falcon-H1",
        "mixers.P.ssm is discrete_mamba2",
    ),
    "a lag": (("llama", "P", lite(lag=4)), {}, "Falcon-H1", "mixers.P.ssm.lag is 4"),
    "windows": (("llama", "P", {"P": lite()["P"] | {"window": 9}}), {}, "Falcon-H1", "mixers.P.window is 9"),
    "shared keys": (
        ("llama", "PS", lite() | {"S": lite()["P"] | {"share_kv": True}}),
        {},
        "Falcon-H1",
        "mixers.S.share_kv is true",
    ),
    "attention alone": (("llama", "AP", lite()), {}, "Falcon-H1", "pattern has attention without a mixer in layers 0"),
    "two sizes": (("llama", "PQ", lite() | {"Q": lite(expand=1)["P"]}), {}, "Falcon-H1", "ssm.expand differs between"),
    "Gemma": (("gemma3_text", "P", lite()), {"head_dim": 8}, "Falcon-H1", "the teacher is a gemma3_text model"),
    "NoPE layers": (("smollm3", "P", lite()), {"no_rope_layers": [1, 0]}, "Falcon-H1", "the teacher is a smollm3 model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(name):
    arguments, changes, container, said = REFUSED[name]
    source = of(*arguments, **changes)
    fit = fitting(source)
    assert fit.container is None
    assert any(said in why for why in fit.reasons[container]), fit.reasons[container]
    assert said in target("native").refuses(source)


def test_engines_say_why_not():
    def reasons(*arguments, **changes):
        source = of(*arguments, **changes)
        return {engine: why for engine, why in fitting(source).container.engines(source).items() if why}

    assert reasons("qwen3", "MA") == {} and set(reasons("qwen3", "AM")) == {"mlx"}
    assert reasons("llama", "P", lite(n_groups=1)) == {}
    assert "n_groups: 1" in reasons("llama", "P", lite(n_groups=2))["mlx"]
    biased = reasons("qwen2", "P", lite(n_groups=1))
    assert set(biased) == {"vllm"} and "biases in the attention" in biased["vllm"]
    biased = ("llama", "P", lite(n_groups=1))
    assert set(reasons(*biased, attention_bias=True)) == {"vllm"}
    assert "biases in the output of its attention" in target("gguf").refuses(of(*biased, attention_bias=True))
    assert "MLP" in reasons("llama", "P", lite(n_groups=1), mlp_bias=True)["vllm"]


@pytest.mark.parametrize(
    ("recipe", "container"),
    [
        ("qwen3-0.6b_gated-deltanet", "Qwen3_5ForCausalLM"),
        ("smollm2-135m_hymba-lite", "FalconH1ForCausalLM"),
        ("smollm2-135m_gated-deltanet", None),
        ("smollm2-135m_hymba", None),
    ],
)
def test_shipped_recipes_fit_as_they_say(recipe, container):
    """On teachers of two layers of the published shapes."""
    found = load(recipe)
    published = {"qwen3": {"head_dim": 8}, "llama": {}}
    family = "qwen3" if recipe.startswith("qwen3") else "llama"
    layers = 4 if "P" in found.mixers and len(found.pattern) > 4 else len(found.pattern)
    pattern = "FPSP" if layers == 4 and len(found.pattern) > 4 else found.pattern
    mixers = {letter: options for letter, options in found.mixers.items() if letter in pattern}
    student = student_of(family, pattern, mixers, num_hidden_layers=layers, **published[family])
    fit = fitting(Source.of(student.config))
    assert getattr(fit.container, "name", None) == container
    assert ("native" in found.export) == bool(container)
    if container:
        assert not any(fit.container.engines(Source.of(student.config)).values())
