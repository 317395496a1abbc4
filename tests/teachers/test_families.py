"""Every row of the table: attention recomputed from `attention_weights` is the module's; observing changes nothing."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.recipe import shipped_folder
from teachers.families import FAMILIES
from teachers.teacher import Teacher
from teachers.weights import AttentionWeights

# A tiny model a family, made from a published config's own entries where a snapshot is shipped.
SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SNAPSHOTS = {"llama": ["llama-3.2-1b", "smollm2-135m-instruct"]}
CASES = [(family, name) for family in FAMILIES for name in SNAPSHOTS[family]]


def tiny(tokenizer, family, snapshot, **changes):
    """A random teacher of a family, as small as can be, otherwise as published."""
    config = AutoConfig.from_pretrained(shipped_folder() / "configs" / f"{snapshot}.json")
    config = type(config)(**{**config.to_dict(), **SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return Teacher(snapshot, model, tokenizer, FAMILIES[family])


@pytest.mark.parametrize(("family", "snapshot"), CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_attention_from_weights_is_the_modules(tokenizer, family, snapshot, bias):
    teacher = tiny(tokenizer, family, snapshot, attention_bias=bias)
    for parameter in teacher.model.parameters():  # biases start at zero, where a wrong one would not show
        parameter.data.normal_(0, 0.2)
    ids = torch.randint(0, 96, (2, 24))
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    documents = torch.tensor([[0] * 10 + [1] * 14] * 2)
    for seen in teacher.observe(ids, positions, [0, 1], qkv=True):
        weights = teacher.attention_weights(seen.layer)
        assert (weights.q_bias is not None) == bias
        found = recompute(seen, weights, documents, teacher.attention_scale)
        assert torch.allclose(found, seen.output, atol=1e-5)


def recompute(seen, weights: AttentionWeights, documents, scale):
    """The layer's output from its input, its rotary tables and the head-major weights alone."""
    heads, keys = weights.q.shape[0], weights.k.shape[0]
    parts = {}
    for name in "qkv":
        part = torch.einsum("btd,hpd->bthp", seen.input, getattr(weights, name))
        bias = getattr(weights, f"{name}_bias")
        parts[name] = part if bias is None else part + bias
    cos, sin = (table[:, :, None] for table in seen.rope)
    for name in "qk":
        first, second = parts[name].chunk(2, -1)
        parts[name] = parts[name] * cos + torch.cat([-second, first], -1) * sin
        assert torch.allclose(parts[name], getattr(seen, name), atol=1e-5), f"{name} is not what the softmax sees"
    time = documents.shape[1]
    hidden = torch.ones(time, time, dtype=torch.bool).triu(1) | (documents[:, :, None] != documents[:, None])
    out = 0.0
    for head in range(heads):
        key = head // (heads // keys)
        logits = torch.einsum("btp,bsp->bts", parts["q"][:, :, head], parts["k"][:, :, key]) * scale
        attended = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ parts["v"][:, :, key]
        out = out + attended @ weights.o[head].T
    return out if weights.o_bias is None else out + weights.o_bias


@pytest.mark.parametrize(("family", "snapshot"), CASES)
def test_observing_changes_nothing(tokenizer, family, snapshot):
    teacher = tiny(tokenizer, family, snapshot)
    ids, positions = torch.randint(0, 96, (2, 12)), torch.arange(12).expand(2, -1)
    before = teacher.hidden(ids, positions)
    implementation = teacher.config._attn_implementation
    seen = list(teacher.observe(ids, positions, [1], qkv=True))
    assert [one.layer for one in seen] == [1]
    assert teacher.config._attn_implementation == implementation
    assert torch.equal(teacher.hidden(ids, positions), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.model.modules())


def test_real_teacher_attention(smollm2):
    ids = smollm2.tokenizer("The heart pumps blood through the body.", return_tensors="pt").input_ids
    documents = torch.zeros_like(ids)
    for seen in smollm2.observe(ids, torch.arange(ids.shape[1])[None], [0, 14, 29], qkv=True):
        found = recompute(seen, smollm2.attention_weights(seen.layer), documents, smollm2.attention_scale)
        assert torch.allclose(found, seen.output, atol=1e-3, rtol=1e-3)


def test_fingerprints_tell_teachers_apart(tokenizer):
    one, other = (tiny(tokenizer, "llama", "smollm2-135m-instruct") for _ in range(2))
    assert one.fingerprint != other.fingerprint
    other.model.load_state_dict(one.model.state_dict())
    del other.__dict__["fingerprint"]
    assert one.fingerprint == other.fingerprint
