"""Every row of the table: attention recomputed from `attention_weights` is the module's; observing changes nothing."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import students
import teachers
from distill.build import build, transfer_report
from distill.output_head import head_of
from distill.shipped import shipped_folder
from students.config import Layout
from students.kernels.linear_kl.reference import logits_of
from teachers.families import FAMILIES, family_of
from teachers.weights import AttentionWeights, LogitRules
from tests.teachers.tiny import ALL, CHECKPOINTS, EVERY, supported, tiny_model, tiny_teacher

AS_PUBLISHED = [(name, {}) for name in EVERY]
BIASED = [(CHECKPOINTS[family][0], {"attention_bias": True}) for family in ("llama", "granite", "qwen3", "olmo2", "cohere")]
OTHERWISE = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("qwen2.5-0.5b", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    *[("falcon-7b", {"multi_query": False, "num_kv_heads": 6, "bias": True})] * supported("falcon"),
]


def test_every_family_has_a_checkpoint_and_every_config_a_family():
    assert set(CHECKPOINTS) == set(FAMILIES)
    assert {path.stem for path in Path(shipped_folder() / "configs").glob("*.json")} == set(ALL)


@pytest.mark.parametrize(("name", "changes"), [*AS_PUBLISHED, *BIASED, *OTHERWISE])
def test_attention_from_weights_is_the_modules(name, changes):
    teacher = tiny_teacher(name, **changes)
    ids = torch.randint(0, 96, (2, 24))
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    documents = torch.tensor([[0] * 10 + [1] * 14] * 2)
    for seen in teacher.observe(ids, positions, [0, 1], qkv=True):
        weights = teacher.attention_weights(seen.layer)
        if "attention_bias" in changes or "bias" in changes:
            assert weights.q_bias is not None
        found = recompute(seen, weights, documents, teacher.logit_rules(seen.layer))
        assert torch.allclose(found, seen.output, atol=1e-4, rtol=1e-4)


def recompute(seen, weights: AttentionWeights, documents, rules: LogitRules):
    """The layer's output from its input, its rotary tables and the head-major weights alone, head by head."""
    heads, keys = weights.q.shape[0], weights.k.shape[0]
    parts = {}
    for name in "qkv":
        part = torch.einsum("btd,hpd->bthp", seen.input, getattr(weights, name))
        bias = getattr(weights, f"{name}_bias")
        parts[name] = part if bias is None else part + bias
    for name in "qk":
        if rules.norm:
            parts[name] = normalised(parts[name], getattr(weights, f"{name}_norm"), rules)
        if rules.rope:
            parts[name] = rotated(parts[name], *seen.rope, rules.rope)
        assert torch.allclose(parts[name], getattr(seen, name), atol=1e-4), f"{name} is not what the softmax sees"
    time = documents.shape[1]
    lag = torch.arange(time)[:, None] - torch.arange(time)
    hidden = (lag < 0) | (documents[:, :, None] != documents[:, None])
    if rules.window:
        hidden = hidden | (lag >= rules.window)
    out = 0.0
    for head in range(heads):
        key = head // (heads // keys)
        logits = torch.einsum("btp,bsp->bts", parts["q"][:, :, head], parts["k"][:, :, key]) * rules.scale
        if rules.softcap:
            logits = torch.tanh(logits / rules.softcap) * rules.softcap
        attended = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ parts["v"][:, :, key]
        out = out + attended @ weights.o[head].T
    return out if weights.o_bias is None else out + weights.o_bias


def normalised(x, weight, rules):
    if rules.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    power = x.square().mean((2, 3) if rules.norm == "rms_wide" else 3, keepdim=True)
    return x / (power + rules.norm_eps).sqrt() * weight


def rotated(x, cos, sin, kind):
    """Channel by channel, as complex numbers."""
    width = cos.shape[-1]
    first, second = (
        (range(width // 2), range(width // 2, width)) if kind == "half" else (range(0, width, 2), range(1, width, 2))
    )
    out = x.clone()
    for one, other in zip(first, second, strict=True):
        c, s = cos[:, :, None, one], sin[:, :, None, one]
        out[..., one], out[..., other] = x[..., one] * c - x[..., other] * s, x[..., other] * c + x[..., one] * s
    return out


@pytest.mark.parametrize("name", EVERY)
def test_observing_changes_nothing(name):
    teacher = tiny_teacher(name)
    ids, positions = torch.randint(0, 96, (2, 12)), torch.arange(12).expand(2, -1)
    before = teacher.hidden(ids, positions)
    implementation = teacher.config._attn_implementation
    seen = list(teacher.observe(ids, positions, [1], qkv=True))
    assert [one.layer for one in seen] == [1]
    assert teacher.config._attn_implementation == implementation
    assert torch.equal(teacher.hidden(ids, positions), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.model.modules())


@pytest.mark.parametrize("name", EVERY)
def test_the_head_is_the_models(name):
    teacher = tiny_teacher(name)
    ids, positions = torch.randint(0, 96, (2, 12)), torch.arange(12).expand(2, -1)
    found = logits_of(teacher.hidden(ids, positions), head_of(teacher.model))
    assert torch.allclose(found, teacher.model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        *[("falcon-7b", {"alibi": True}, "ALiBi")] * supported("falcon"),
        ("phi-1_5", {"qk_layernorm": True}, "biases"),
        ("gemma-3-270m", {"use_bidirectional_attention": True}, "reads later tokens"),
    ],
)
def test_what_a_row_refuses(name, change, why):
    with pytest.raises(ValueError, match=f"{next(iter(change))} = True.*{why}"):
        tiny_teacher(name, **change)


def test_an_unknown_family_is_refused():
    from transformers import OPTConfig

    with pytest.raises(ValueError, match=r"'opt' model; this version distils .*llama"):
        family_of(OPTConfig(), "some/opt")


def test_transformers_too_old_for_a_family_is_refused(monkeypatch):
    from transformers import FalconConfig

    monkeypatch.setattr("teachers.families.transformers", SimpleNamespace(__version__="5.17.0"))
    with pytest.raises(ValueError, match=r"'falcon' model, which needs transformers >= 5.24; this is 5.17.0"):
        family_of(FalconConfig(), "tiiuae/falcon-7b")


def test_real_teacher_attention(smollm2):
    ids = smollm2.tokenizer("The heart pumps blood through the body.", return_tensors="pt").input_ids
    documents = torch.zeros_like(ids)
    for seen in smollm2.observe(ids, torch.arange(ids.shape[1])[None], [0, 14, 29], qkv=True):
        found = recompute(seen, smollm2.attention_weights(seen.layer), documents, smollm2.logit_rules(seen.layer))
        assert torch.allclose(found, seen.output, atol=1e-3, rtol=1e-3)


def test_fingerprints_tell_teachers_apart():
    one, other = (tiny_teacher("smollm2-135m-instruct") for _ in range(2))
    assert one.fingerprint != other.fingerprint
    other.model.load_state_dict(one.model.state_dict())
    del other.__dict__["fingerprint"]
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize("name", EVERY)
def test_loaded_from_a_folder(name, tokenizer, tmp_path):
    model = tiny_model(name, vocab_size=384)  # some tokenizer classes add a token
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    teacher = teachers.load(str(tmp_path))
    ids = torch.randint(0, 320, (1, 12))
    assert torch.allclose(teacher.model(ids).logits, model(ids).logits, atol=1e-5)
    assert teacher.config._attn_implementation == model.config._attn_implementation
    assert teacher.family == FAMILIES[model.config.model_type]


def saved(model, tokenizer, folder, **tensors):
    """A model's folder, with some tensors more or changed."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-0.5b", "gemma-2-2b"])
def test_a_head_of_its_own_under_a_config_that_ties(name, tokenizer, tmp_path):
    """transformers keeps such a head; so does the student, and so does what the student saves."""
    model = tiny_model(name, vocab_size=384)
    assert model.config.tie_word_embeddings
    head = torch.randn_like(model.get_input_embeddings().weight)
    teacher = teachers.load(saved(model, tokenizer, tmp_path / "teacher", **{"lm_head.weight": head}))
    assert torch.equal(teacher.model.get_output_embeddings().weight, head)
    student, _ = build(teacher, Layout("A" * teacher.n_layers))
    ids = torch.randint(0, 320, (1, 12))
    wanted = teacher.model(ids).logits
    assert torch.allclose(student(ids).logits, wanted, atol=1e-5)
    student.save_pretrained(tmp_path / "student")
    assert torch.allclose(students.load(tmp_path / "student")(ids).logits, wanted, atol=1e-5)


def test_a_head_that_equals_the_embeddings_stays_tied(tokenizer, tmp_path):
    model = tiny_model("smollm2-135m-instruct", vocab_size=384)
    embeddings = model.get_input_embeddings().weight.detach().clone()
    teacher = teachers.load(saved(model, tokenizer, tmp_path, **{"lm_head.weight": embeddings}))
    assert teacher.config.tie_word_embeddings
    assert teacher.model.get_output_embeddings().weight is teacher.model.get_input_embeddings().weight


def test_tensors_without_a_place(tokenizer, tmp_path):
    """Tables that are computed today pass; others are refused, or left out where a pattern says so, and named."""
    model = tiny_model("smollm2-135m-instruct", vocab_size=384)
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert teachers.load(saved(model, tokenizer, tmp_path / "old", **harmless)).ignored == ()
    more = harmless | {f"model.layers.7.{part}": torch.ones(4) for part in ("one", "two")}
    folder = saved(model, tokenizer, tmp_path / "more", **more)
    with pytest.raises(ValueError, match=r"no place for model\.layers\.7\.one, model\.layers\.7\.two of its files"):
        teachers.load(folder)
    with pytest.raises(ValueError, match=r"no place for model\.layers\.7\.two of its files"):
        teachers.load(folder, ignore=["*.one"])
    teacher = teachers.load(folder, ignore=["model.layers.7.*"])
    assert teacher.ignored == ("model.layers.7.one", "model.layers.7.two")
    student, transfers = build(teacher, Layout("A" * teacher.n_layers))
    assert transfer_report(teacher, student, transfers)["ignored"] == list(teacher.ignored)


def test_an_adapter_beside_the_weights_is_refused(tokenizer, tmp_path):
    folder = saved(tiny_model("smollm2-135m-instruct", vocab_size=384), tokenizer, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}')
    with pytest.raises(ValueError, match=r"adapter_config\.json; merge it"):
        teachers.load(folder)


@pytest.mark.parametrize(
    ("name", "window"),
    [("smollm2-135m-instruct", None), ("olmo-2-0425-1b", None), ("granite-3.1-2b-base", None), ("mistral-7b-v0.1", 5)],
)
def test_a_window_that_the_models_class_does_not_know(name, window):
    """A config may have `sliding_window` left in it by whoever made it from another."""
    teacher = tiny_teacher(name)
    teacher.config.sliding_window = 5
    assert teacher.logit_rules(0).window == window
