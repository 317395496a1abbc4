"""GGUF files, written by gguf-py and read back: the model comes back whole, or the file is refused and says why."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import teachers
from teachers.gguf import converted, read
from teachers.source import resolve
from tests.conftest import SMOLLM2
from tests.teachers.gguf_cases import CASES
from tests.teachers.gguf_files import TYPES, random_model, write

pytestmark = pytest.mark.usefixtures("own_cache")

EXACT = 1e-5  # the largest difference of logits of size 1: both sides compute in float32 with the same weights


def largest_difference(one, other):
    for model in (one, other):
        model.set_attn_implementation("eager")  # sdpa leaves out Gemma 2's soft-caps in transformers 5.17
    ids = torch.randint(0, 300, (2, 80))
    return (one(ids).logits - other(ids).logits).abs().max().item()


@pytest.mark.matrix
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_a_model_comes_back_as_the_file_has_it(tmp_path, name, kind):
    model = random_model(CASES[name])
    folder = converted(write(CASES[name], model, tmp_path / "tiny.gguf", kind))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert largest_difference(loaded, model) < EXACT
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert loaded.config.eos_token_id == 2


@pytest.mark.parametrize("name", ["gemma2", "gemma3-linear", "qwen3-yarn", "phi3-longrope", "llama-3.2", "mistral"])
def test_what_is_easily_lost_comes_back(tmp_path, name):
    model = random_model(CASES[name])
    folder = converted(write(CASES[name], model, tmp_path / "tiny.gguf"))
    assert largest_difference(AutoModelForCausalLM.from_pretrained(folder), model) < EXACT


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0}),
        ("gemma2", {"attn_logit_softcapping": 50.0}),
        ("gemma3", {"sliding_window": 512}),
        ("mistral", {"sliding_window": None}),
        ("phi3", {"sliding_window": None}),
        ("llama", {"rms_norm_eps": 1e-6}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ],
)
def test_the_check_would_notice(tmp_path, name, entry):
    """Another value of an entry that transformers drops or defaults does change the logits of these models."""
    model, changed = random_model(CASES[name]), random_model(CASES[name])
    changed = type(changed)(type(changed.config)(**{**changed.config.to_dict(), **entry})).eval()
    changed.load_state_dict(model.state_dict())
    assert largest_difference(changed, model) > 100 * EXACT


def test_a_llama_is_a_teacher(tmp_path):
    model = random_model(CASES["llama-3.2"])
    path = write(CASES["llama-3.2"], model, tmp_path / "tiny.gguf")
    teacher = teachers.load(str(path))
    assert largest_difference(teacher.model, model) < EXACT
    assert teacher.config.rope_parameters["rope_type"] == "llama3"
    folder = converted(path)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert converted(path) == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp


REFUSED = {
    "rotary frequencies": ("llama", {"add": {"rope_freqs.weight": np.linspace(1, 3, 32, dtype=np.float32)}}, "no llama3 sc"),
    "another model's frequencies": ("qwen2", {"add": {"rope_factors_long.weight": np.ones(8, np.float32)}}, "no place for"),
    "spare tensor": (
        "qwen3",
        {"add": {"blk.0.attn_q.bias": np.ones(256, np.float32)}},
        r"no place for blk\.0\.attn_q\.bias",
    ),
    "missing tensor": (
        "qwen2",
        {"leave_out": ["blk.1.attn_k.bias"]},
        r"no tensor for model\.layers\.1\.self_attn\.k_proj\.b",
    ),
    "missing norm": ("gemma3", {"leave_out": ["blk.0.attn_q_norm.weight"]}, r"no tensor for .*self_attn\.q_norm\.weight"),
    "unknown entry": (
        "qwen3",
        {"entries": {"logit_scale": 0.5}},
        r"says qwen3\.logit_scale = 0\.5, which cannot be honoured",
    ),
    "unknown scaling": ("llama", {"entries": {"rope.scaling.type": "other"}}, r"rope\.scaling\.type 'other' is not read"),
    "two scalings": (
        "llama-3.2",
        {"entries": {"rope.scaling.factor": 2.0}},
        r"'linear' beside rope_freqs\.weight is not read",
    ),
    "phi3 scaling": ("phi3", {"entries": {"rope.scaling.type": "yarn"}}, r"phi3\.rope\.scaling\.type 'yarn' is not read"),
    "partial rotation": ("qwen2", {"entries": {"rope.dimension_count": 16}}, r"dimension_count is 16, but heads have 64"),
    "wrong head width": ("qwen3", {"entries": {"attention.value_length": 32}}, r"value_length is 32, but the queries have"),
    "experts": ("llama", {"entries": {"expert_count": 4}}, "mixture of experts"),
    "heads by layer": (
        "qwen2",
        {"entries": {"attention.head_count_kv": [2, 1]}},
        "head_count_kv differs from layer to layer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rebuilt_is_refused(tmp_path, name):
    case, changes, message = REFUSED[name]
    path = write(CASES[case], random_model(CASES[case]), tmp_path / "odd.gguf", **changes)
    with pytest.raises(ValueError, match=message):
        converted(path)
    assert not list((tmp_path / "cache" / "teachers").iterdir())


def test_an_architecture_without_a_row(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "bloom.gguf", "bloom")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match=r"bloom\.gguf is a 'bloom' model; GGUF files are read of llama, qwen2, qwen3, phi3"
    ):
        converted(tmp_path / "bloom.gguf")


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"GGUF\x03\x00\x00\x00"])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.gguf is not a readable GGUF file"):
        teachers.load(str(path))


def test_a_truncated_file_is_named(tmp_path):
    path = write(CASES["llama"], random_model(CASES["llama"]), tmp_path / "whole.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(ValueError, match=r"cut\.gguf"):
        teachers.load(str(cut))


def test_the_tokenizer_is_the_files(tmp_path):
    path = write(CASES["llama"], random_model(CASES["llama"]), tmp_path / "tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(converted(path))
    tokens = read(path).general("tokenizer.ggml.tokens")
    assert [tokens[index] for index in tokenizer("abba").input_ids] == ["ab", "ba"]
    assert tokenizer.decode(tokenizer("a long cab ride").input_ids) == "a long cab ride"
    assert tokenizer.eos_token == "</s>"
    assert len(tokenizer) == len(tokens) == 300


@pytest.mark.parametrize("stated", [None, False])
def test_llama_3_words_and_beginnings(tmp_path, stated):
    """What llama.cpp knows of this vocabulary by its name: entries are whole words, and text begins with <s>."""
    flags = {} if stated is None else {"tokenizer.ggml.add_bos_token": stated}
    case = CASES["llama"]
    path = write(case, random_model(case), tmp_path / "tiny.gguf", pre="llama-bpe", flags=flags)
    tokenizer = AutoTokenizer.from_pretrained(converted(path))
    tokens = read(path).general("tokenizer.ggml.tokens")
    found = [tokens[index] for index in tokenizer("the ab").input_ids]
    assert found == ([] if stated is False else ["<s>"]) + ["the", "Ġ", "ab"]


@pytest.mark.parametrize("name", ["llama", "phi3-longrope", "gemma2"])
def test_nothing_is_drawn_into_a_log(tmp_path, capfd, caplog, name):
    path = write(CASES[name], random_model(CASES[name]), tmp_path / "tiny.gguf")
    capfd.readouterr()
    caplog.clear()
    converted(path)
    out, err = capfd.readouterr()
    assert "%|" not in out + err
    assert not [record.message for record in caplog.records if "pad_token_id" in record.message]


def test_the_real_teacher_has_plain_rope():
    assert read(Path(resolve(SMOLLM2).location)).vector("rope_freqs.weight") is None


def test_a_plan_reads_the_config_alone(tmp_path, tiny_recipe):
    from distill.loading import teacher_config
    from distill.recipe_file import check

    model = random_model(CASES["llama-3.2"])
    path = write(CASES["llama-3.2"], model, tmp_path / "tiny.gguf")
    config = teacher_config(check(tiny_recipe | {"teacher": str(path)}, "here"))
    assert config.rope_parameters == model.config.rope_parameters and config.head_dim == 64
    assert not (tmp_path / "cache").exists()


def test_without_gguf_the_error_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(ImportError, match=r"pip install 'distill-hybrids\[gguf\]'"):
        teachers.load(str(tmp_path / "some.gguf"))
