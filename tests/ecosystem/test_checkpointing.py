"""What passes between layers beside their arguments: recomputed layers have right gradients, and the body called alone sees
what `forward` would have told it."""

import pytest
import torch

from students.compat import CACHE
from tests.ecosystem.conftest import every_layout
from tests.ecosystem.layouts import SHARING

pytestmark = pytest.mark.ecosystem


def gradients(student, ids, mask):
    student.zero_grad()
    student(ids, attention_mask=mask, labels=ids).loss.backward()  # a cache by default, as a user's call would have it
    return {name: part.grad.clone() for name, part in student.named_parameters() if part.grad is not None}


def recompute(student, options):
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    enable(options)


@every_layout
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recomputed_layers_have_the_same_gradients(student, layout, reentrant, ids):
    student.requires_grad_(True).train()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    wanted = gradients(student, ids, mask)
    recompute(student, {"use_reentrant": reentrant})
    if reentrant and layout in SHARING:
        with pytest.raises(RuntimeError, match=r'share_kv.*"use_reentrant": False'):
            gradients(student, ids, mask)
        return
    found = gradients(student, ids, mask)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("layout", SHARING)
@pytest.mark.parametrize("first", [0, 1], ids=["the giver", "the taker"])
def test_one_recomputed_layer_is_refused_too(student, first, ids):
    """Somebody's own reentrant checkpointing, of a layer that gives keys or of one that takes them."""
    from torch.utils.checkpoint import checkpoint

    student.requires_grad_(True)
    layer = student.model.layers[first]
    forward = layer.forward
    layer.forward = lambda h, **keywords: checkpoint(lambda x: forward(x, **keywords), h, use_reentrant=True)
    with pytest.raises(RuntimeError, match="share_kv"):
        student(ids, use_cache=False)
    with torch.no_grad():
        assert torch.isfinite(student(ids, use_cache=False).logits).all()


@every_layout
@torch.no_grad()
def test_the_body_alone_gives_what_forward_does(student, ids, same):
    """As fused losses call it: padded, packed, with embeddings, with and behind a cache; by keyword and by position."""
    body, head = student.base_model, student.get_output_embeddings()

    def logits(*inputs, **keywords):
        return head(body(*inputs, **keywords).last_hidden_state)

    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    real = mask.bool()
    wanted = student(ids, attention_mask=mask, position_ids=positions).logits[real]
    same(logits(ids, attention_mask=mask, position_ids=positions)[real], wanted, 1e-5)
    same(logits(ids, mask, positions)[real], wanted, 1e-5)
    packed = torch.tensor([[*range(6), *range(7)]])
    wanted = student(ids, position_ids=packed, use_cache=False).logits
    same(logits(ids, position_ids=packed, use_cache=False), wanted, 1e-5)
    embeds = student.get_input_embeddings()(ids)
    wanted = student(ids).logits
    same(logits(inputs_embeds=embeds, use_cache=False), wanted, 1e-5)
    first = body(ids[:, :9])
    assert type(first.past_key_values) is type(student.new_cache())
    same(logits(ids[:, 9:], **{CACHE: first.past_key_values}), wanted[:, 9:], 1e-3)
    assert not body._forward_hooks  # nothing of a call stays behind
    with pytest.raises(ValueError, match="2-D attention_mask"):
        body(ids, attention_mask=mask[:, None, None])
    assert not body._forward_hooks
