"""Containers: a random student, every parameter away from its start, is the same function in transformers' own class."""

import json

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from distill.build import build
from distill.exporters.containers import fitting
from distill.exporters.source import Source
from students.config import Layout
from tests.teachers.tiny import tiny_teacher

DELTA = {"M": {"mixer": "gated_deltanet"}}
SINGLE = Version(transformers.__version__) >= Version("5.18")  # Falcon-H1 decodes batches
BOUND = 1e-4


def lite(**ssm):
    return {"P": {"mixer": "parallel_heads", "norm": False, "ssm": {"mixer": "mamba2", **ssm}}}


def random_student(name, pattern, mixers, *, meta_tokens=0, **changes):
    """A student whose every parameter is random, with norms around 1 and states that remember."""
    layers = changes.setdefault("num_hidden_layers", 4)
    teacher = tiny_teacher(name, **changes)
    student, _ = build(teacher, Layout.over(layers, pattern, mixers, meta_tokens))
    generator = torch.Generator().manual_seed(3)
    for key, parameter in student.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        middle = 1.0 if "norm" in key or key.endswith(("beta", "scale")) else 0.0
        parameter.data = middle + noise * (0.5 if parameter.dim() == 1 or "beta" in key else 0.25)
    return student.eval()


def contained(student, folder):
    """The student in its container, as transformers loads it from a folder without any code of ours."""
    source = Source.of(student.config)
    fit = fitting(source)
    assert fit.container is not None, fit.reasons
    folder.mkdir(exist_ok=True)
    entries = fit.container.config(source)
    tensors = fit.container.tensors(source, {name: t.float() for name, t in student.state_dict().items()})
    (folder / "config.json").write_text(json.dumps(entries))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == fit.container.name
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@torch.no_grad()
def check_same(student, model, rows=2):
    """Logits, cached decoding behind a prompt in two pieces, and rows padded on the left."""
    ids = torch.randint(1, 96, (rows, 33))
    expected = student(ids).logits
    assert expected.std() > 0.1  # a student that says nothing is the same as any other
    scale = expected.std().clamp_min(1)
    assert (model(ids).logits - expected).abs().max() / scale < BOUND
    cache, pieces = None, []
    for piece in (ids[:, :19], ids[:, 19:25], *ids[:, 25:].split(1, 1)):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache, pieces = out.past_key_values, [*pieces, out.logits]
    assert (torch.cat(pieces, 1) - expected).abs().max() / scale < BOUND
    padded = torch.cat([torch.zeros(rows, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 5).long().expand_as(padded)
    assert (model(padded, attention_mask=mask).logits[:, 5:] - expected).abs().max() / scale < BOUND
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = student.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings), tokens)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 5:], tokens)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
}


@pytest.mark.parametrize(
    ("pattern", "mixers", "changes"),
    [
        ("AMMM", DELTA, {}),
        ("MMMA", DELTA, {"tie_word_embeddings": False}),
        ("MA", DELTA, {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("MAM", DELTA, {"rope_parameters": YARN}),
        ("MA", DELTA, {"rope_parameters": LLAMA3, "head_dim": 20}),
        ("MMA", DELTA, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, "hidden_size": 40}),
        ("MNA", {"M": {"mixer": "gated_deltanet", "d_conv": 2}, "N": {"mixer": "gated_deltanet", "d_conv": 6}}, {}),
    ],
    ids=["AMMM", "MMMA", "wide heads", "yarn", "llama3", "linear", "taps"],
)
def test_a_qwen3_student_is_the_same_in_qwen35(pattern, mixers, changes, tmp_path):
    student = random_student("qwen3-0.6b", pattern, mixers, **changes)
    check_same(student, contained(student, tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "mixers", "changes"),
    [
        ("smollm2-135m-instruct", lite(), {}),
        ("smollm2-135m-instruct", lite(expand=1, n_groups=2, d_state=12), {"tie_word_embeddings": False}),
        ("smollm2-135m-instruct", lite(n_groups=1, d_conv=3), {"mlp_bias": True, "attention_bias": True}),
        ("llama-3.2-1b", lite(n_groups=3), {"head_dim": 20}),
        ("qwen2.5-0.5b", lite(n_groups=6), {}),
        ("mistral-7b-v0.1", lite(expand=1), {"sliding_window": None}),
    ],
    ids=["Llama", "untied, groups", "biases", "llama3 rope", "Qwen2", "Mistral"],
)
def test_a_hymba_lite_student_is_the_same_in_falcon_h1(name, mixers, changes, tmp_path):
    student = random_student(name, "P", mixers, num_hidden_layers=3, **changes)
    check_same(student, contained(student, tmp_path / "out"))
