"""Keys and values shared between layers: whose they are, what the stages make of them, what the cache saves."""

import pytest
import torch

from distill.build import build, transfer_report
from distill.errors import UserError
from distill.stages.align import Align
from distill.stages.observing import observed
from distill.text.windows import Batch
from students.config import Layout
from students.mixers.mixer import Context
from tests.distill.family_checks import check_documents, check_generation, run_stages
from tests.distill.family_checks import text as packed
from tests.students.layouts import text
from tests.teachers.tiny import tiny_teacher

OWN = {"mixer": "attention", "window": 6, "sinks": 2}
SHARES = {"mixer": "attention", "window": 4, "sinks": 2, "share_kv": True}
HEADS = {"mixer": "parallel_heads", "window": 6, "sinks": 2}


def test_keys_and_values_are_the_earlier_layers(teacher):
    """By hand: queries of the layer that shares, keys and values of the one before it, one softmax."""
    student, _ = build(teacher, Layout("WASA", {"W": {"mixer": "attention"}, "S": {"mixer": "attention", "share_kv": True}}))
    slots, seen = [student.model.layers[layer].self_attn for layer in (0, 2)], []
    for slot in slots:
        slot.register_forward_hook(lambda _, given, kept, out: seen.append((kept, out[0])), with_kwargs=True)
    student(text(2, 12), use_cache=False)
    (given, _), (taken, out) = seen
    owner, sharer = (slot.mixer for slot in slots)
    parts = owner.project(given["hidden_states"], _context(given))
    q = sharer._turned(sharer.q_proj(taken["hidden_states"]).unflatten(-1, (4, 8)), None, _context(taken))
    logits = torch.einsum("bthp,bshp->bhts", q, parts.k) * 8**-0.5
    weights = logits.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    wanted = sharer.o_proj(torch.einsum("bhts,bshp->bthp", weights, parts.values).flatten(2))
    assert torch.allclose(out, wanted, atol=1e-5)


def _context(keywords):
    return Context(rope=keywords["position_embeddings"])


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b", "pythia-160m"])
def test_families_take_every_stage(name):
    teacher, batch = tiny_teacher(name), packed()
    student, transfers = build(teacher, Layout("PS", {"P": HEADS, "S": {**HEADS, "share_kv": True}}))
    run_stages(teacher, student, transfers, batch)
    check_documents(student, batch)
    check_generation(student)


def test_align_trains_each_layer_by_its_own_loss(teacher):
    ids = text(2, 21)
    documents, positions = torch.zeros(2, 20, dtype=torch.long), torch.arange(20).expand(2, -1)
    batch = Batch(ids[:, :-1], documents, positions, ids[:, 1:], torch.ones(2, 20), documents)
    student, _ = build(teacher, Layout("WASA", {"W": OWN, "S": SHARES}))
    stage = Align(teacher, student, Align.Options(tokens=1, lr=1e-3))
    student.requires_grad_(True)
    gradients = {}
    for name, loss in stage.losses(batch):
        student.zero_grad()
        loss.backward()
        gradients[name] = {layer for layer, mixer in student.mixers.items() if mixer.q_proj.weight.grad is not None}
        assert student.mixers[0].k_proj.weight.grad is None or name == "layer_00"
    assert gradients == {"layer_00": {0}, "layer_02": {2}}
    assert [seen.layer for seen, _ in observed(teacher, student, batch, [2])] == [2]


def test_what_shares_caches_nothing(teacher):
    student, transfers = build(teacher, Layout("WASA", {"W": OWN, "S": SHARES}))
    cache = student.new_cache()
    student(text(1, 20), past_key_values=cache)
    assert cache.layers[0].tensors and not cache.layers[2].tensors
    assert transfer_report(teacher, student, transfers)["unused"] == [
        "model.layers.2.self_attn.k",
        "model.layers.2.self_attn.v",
    ]


@pytest.mark.parametrize(
    ("pattern", "mixers", "message"),
    [
        ("SAAW", {"S": SHARES, "W": OWN}, r"layer 0 \(S\) shares keys and values, but no layer before it has any"),
        ("MSAA", {"S": SHARES, "M": {"mixer": "mamba2"}}, "no layer before it has any"),
        ("WSAA", {"W": OWN, "S": SHARES | {"window": 8}}, r"layer 1 \(window 8, sinks 2\) cannot share the keys of layer 0"),
        ("WSAA", {"W": OWN, "S": SHARES | {"sinks": 3}}, r"keeps fewer \(window 6, sinks 2\)"),
        ("HSAA", {"H": {"mixer": "split_heads", "keep": [0]}, "S": SHARES}, "attention has only some of the heads"),
    ],
)
def test_what_cannot_be_shared(teacher, pattern, mixers, message):
    with pytest.raises(UserError, match=message):
        build(teacher, Layout(pattern, mixers))


def test_families_that_hand_nothing_on():
    with pytest.raises(UserError, match="pass nothing to their attention but positions"):
        build(tiny_teacher("stablelm-2-1_6b"), Layout("WS", {"W": OWN, "S": SHARES}))
