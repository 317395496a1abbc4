"""gguf: the file read back is the student, with any zero padding; its tokenizer cuts text as the student's does;
and llama.cpp, where it is installed, computes what the student computes."""

import builtins
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch

from distill.errors import UserError
from distill.exporters import proofs, target
from distill.exporters.source import Source
from distill.exporters.target import Form
from tests.distill.gguf_back import contents, model_of
from tests.distill.gguf_students import DELTA, SMALL_EPS, STUDENTS, M, exported
from tests.distill.native_students import LLAMA3, YARN
from tests.distill.random_students import loaded, saved, student_of


@pytest.mark.parametrize("name", STUDENTS)
@torch.no_grad()
def test_the_file_read_back_is_the_student(name, tokenizer, tmp_path):
    student, (architecture, entries) = STUDENTS[name]
    folder, path = exported(tmp_path, tokenizer, *student)
    assert path.name == "a-run-F32.gguf"
    found, _, types = contents(path)
    assert set(types.values()) == {"F32"}
    assert found["general.architecture"] == architecture
    for entry, value in entries.items():
        assert found[f"{architecture}.{entry}"] == pytest.approx(value), entry
    ids = torch.randint(1, 320, (2, 19))
    student = loaded(folder)
    wanted = student(ids).logits
    assert wanted.std() > 0.1
    assert (model_of(path, student)(ids).logits - wanted).abs().max() < 1e-4


def test_llama3_divides_frequencies_as_transformers_does(tokenizer, tmp_path):
    _, path = exported(tmp_path, tokenizer, *STUDENTS["llama 3's rope"][0])
    _, tensors, _ = contents(path)
    model = model_of(path, student_of(*STUDENTS["llama 3's rope"][0][:3], rope_parameters=LLAMA3))
    plain = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    divisors = tensors["rope_freqs.weight"]
    assert torch.allclose(plain / divisors, model.model.rotary_emb.inv_freq)
    assert divisors.tolist()[0] == 1 and divisors.tolist()[-1] == 8


def test_matrices_are_float16_and_nothing_else_is(tokenizer, tmp_path):
    _, path = exported(tmp_path, tokenizer, *STUDENTS["llama, tied"][0], Form())
    entries, tensors, types = contents(path)
    assert path.name == "a-run-F16.gguf" and entries["general.file_type"] == 1
    halves = {name for name, kind in types.items() if kind == "F16"}
    kinds = (
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
        "ssm_in",
        "ssm_out",
        "token_embd",
    )
    assert {name.removesuffix(".weight").split(".")[-1] for name in halves} == set(kinds)
    assert set(types.values()) == {"F16", "F32"}
    _, exact = exported(tmp_path / "other", tokenizer, *STUDENTS["llama, tied"][0])
    for name, tensor in contents(exact)[1].items():
        assert torch.equal(tensors[name], tensor.half().float() if name in halves else tensor), name


def test_a_value_beyond_float16_keeps_its_matrix_in_float32(tokenizer, tmp_path):
    student = student_of(*STUDENTS["llama, tied"][0][:3])
    student.model.layers[1].mlp.down_proj.weight.data[3, 5] = 7e4
    folder = saved(student, tmp_path / "student", tokenizer)
    target("gguf").write(folder, tmp_path / "gguf", Form())
    _, tensors, types = contents(next((tmp_path / "gguf").iterdir()))
    assert types["blk.1.ffn_down.weight"] == "F32" and types["blk.0.ffn_down.weight"] == "F16"
    assert tensors["blk.1.ffn_down.weight"][3, 5] == 7e4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.mixer.A_log"])
def test_a_value_that_is_not_finite_is_refused_by_name(name, value, tokenizer, tmp_path):
    student = student_of(*STUDENTS["llama, tied"][0][:3])
    student.get_parameter(name).data.view(-1)[1] = value
    folder = saved(student, tmp_path / "student", tokenizer)
    with pytest.raises(ValueError, match=r"blk\.1\.(ffn_down\.weight|ssm_a) holds a value that is not finite"):
        target("gguf").write(folder, tmp_path / "gguf", Form())


@pytest.mark.parametrize(
    ("student", "why"),
    [
        (("llama", "AMMM", {"M": M}, {"attention_bias": True}), r"no bias in Mamba-2's projections"),
        (("llama", "AMMM", {"M": {"mixer": "discrete_mamba2"}}, {}), "GraniteMoeHybrid"),
        (("qwen3", "MMMA", DELTA, {"rms_norm_eps": 1e-5}), "norms keys with rms_norm_eps 1e-05"),
        (("qwen3", "MMMA", DELTA, SMALL_EPS | {"rope_parameters": LLAMA3}), "no rotary embedding of type 'llama3'"),
        (("llama", "AMMM", {"M": M}, {"rope_parameters": YARN | {"attention_factor": 1.5}}), r"\(attention_factor\)"),
    ],
    ids=["biases", "mixer", "eps", "rope", "yarn"],
)
def test_what_llama_cpp_has_no_place_for_is_refused_by_name(student, why, tokenizer, tmp_path):
    made = student_of(*student[:3], **student[3])
    assert target("gguf").refuses(Source.of(made.config))
    folder = saved(made, tmp_path / "student", tokenizer)
    with pytest.raises(ValueError, match=why):
        target("gguf").write(folder, tmp_path / "gguf", Form())
    assert not (tmp_path / "gguf").exists()


def test_engines_are_llama_cpp_alone():
    engines = target("gguf").engines(Source.of(student_of(*STUDENTS["zamba"][0][:3]).config))
    assert engines["llama.cpp"] is None
    assert all(why for engine, why in engines.items() if engine != "llama.cpp")


def test_without_the_package_gguf_one_message_says_how_to_get_it(tokenizer, tmp_path, monkeypatch):
    folder = saved(student_of(*STUDENTS["zamba"][0][:3]), tmp_path / "student", tokenizer)
    real = builtins.__import__
    monkeypatch.delitem(sys.modules, "gguf", raising=False)

    def absent(name, *rest):
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"package gguf, which is not installed; pip install 'distill-hybrids\[gguf\]'"):
        target("gguf").write(folder, tmp_path / "gguf", Form())
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize(
    ("spoil", "why"), [(lambda file: file.unlink(), "no tokenizer.json"), (lambda file: file.write_text("{"), "is damaged")]
)
def test_a_student_without_a_tokenizer_is_refused(spoil, why, tokenizer, tmp_path):
    folder = saved(student_of(*STUDENTS["zamba"][0][:3]), tmp_path / "student", tokenizer)
    spoil(folder / "tokenizer.json")
    for do in (target("gguf").write, target("gguf").rehearse):
        with pytest.raises(ValueError, match=why):
            do(folder, tmp_path / "gguf", Form())
    assert not (tmp_path / "gguf").exists()


def test_ends_of_generation_come_from_the_student(tokenizer, tmp_path):
    made = student_of(*STUDENTS["zamba"][0][:3])
    made.generation_config.eos_token_id = [7, 9]
    _, path = exported_of(made, tokenizer, tmp_path)
    assert contents(path)[0]["tokenizer.ggml.eos_token_id"] == 0  # the tokenizer's own wins


def exported_of(student, tokenizer, place):
    folder = saved(student, place / "student", tokenizer)
    target("gguf").write(folder, place / "gguf", Form("float32"))
    return folder, next((place / "gguf").iterdir())


def python_of(engine):
    """A Python that has llama.cpp: that of DISTILL_ENGINES, or this one."""
    named = dict(entry.split("=", 1) for entry in os.environ.get("DISTILL_ENGINES", "").split(";") if "=" in entry)
    return named.get(engine, sys.executable)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", STUDENTS)
@torch.no_grad()
def test_llama_cpp_computes_what_the_student_computes(name, tokenizer, tmp_path):
    folder, path = exported(tmp_path, tokenizer, *STUDENTS[name][0])
    student, steps = loaded(folder), 6
    text = torch.randint(1, 320, (1, 21), generator=torch.Generator().manual_seed(2))
    prompts = [text[0, :9].tolist(), text[0].tolist()]
    strings = ["Hello there, it is 1969.", " a\n\n b"]
    job = {"folder": str(path.parent), "texts": text.tolist(), "rows": [[0, 7, 20]], "prompts": prompts, "steps": steps}
    job |= {"forced": None, "dtype": "float32", "strings": strings, "out": str(tmp_path)}
    (tmp_path / "job.json").write_text(json.dumps(job))
    script = shutil.copyfile(Path(proofs.__file__).parent / "llama_cpp.py", tmp_path / "llama_cpp_proof.py")
    where = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python_of("llama.cpp"), script, tmp_path / "job.json"], env=where, check=True)
    answer, rows = json.loads((tmp_path / "answer.json").read_text()), torch.tensor(numpy.load(tmp_path / "rows.npy"))
    wanted = student(text).logits[0].log_softmax(-1)
    # The server caches float16: keys and values rounded so move the student's own log-probabilities by up to 0.044 (yarn).
    bound = 1e-3 if find_spec("llama_cpp") or python_of("llama.cpp") != sys.executable else 6e-2
    assert (rows.log_softmax(-1) - wanted[[0, 7, 20]]).abs().max() < bound
    said = wanted[:-1].gather(1, text[0, 1:, None])[:, 0]
    assert (torch.tensor(answer["logprobs"][0]) - said).abs().max() < bound
    for prompt, tokens in zip(prompts, answer["tokens"], strict=True):
        settings = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert tokens == student.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    assert answer["ids"] == [tokenizer(string).input_ids for string in strings]
