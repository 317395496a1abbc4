"""The op `attention` against its definition, forward and all gradients, in float64."""

import pytest
import torch

from students import kernels
from students.kernels import attention
from students.kernels.attention import cases as attention_cases
from tests.conftest import TOLERANCE
from tests.students.op_checks import assert_close, assert_same_gradients, draw, packed_documents


@pytest.mark.parametrize("case", attention_cases.TEST, ids=str)
def test_attention(case):
    keys = case.t + case.before
    q, k, v = draw(case.b, case.t, case.h, case.d), draw(case.b, keys, case.kv, case.d), draw(case.b, keys, case.kv, 3)
    documents = packed_documents(case.b, keys, True) if case.packed else torch.zeros(case.b, keys, dtype=torch.long)
    positions = kernels.documents.positions(documents)
    found = attention.attention(
        q,
        k,
        v,
        scale=0.3,
        softcap=case.softcap,
        window=case.window,
        sinks=case.sinks,
        documents=documents,
        positions=positions if case.sinks else None,
    )
    wanted = attention_by_definition(q, k, v, case, documents, positions)
    assert_close(found, wanted, 1e-6 if case.softcap else TOLERANCE[torch.float64])
    if case.softcap is None:
        assert_same_gradients((found,), (wanted,), (q, k, v))


def attention_by_definition(q, k, v, case, documents, positions):
    keys = case.t + case.before
    k, v = (part.repeat_interleave(case.h // case.kv, 2) for part in (k, v))
    rows = torch.arange(case.before, keys)[:, None]
    columns = torch.arange(keys)
    seen = (columns <= rows) & (documents[:, case.before :, None] == documents[:, None])
    if case.window is not None:
        seen = seen & ((rows - columns < case.window) | (positions[:, None] < case.sinks))
    logits = torch.einsum("bthd,bshd->bhts", q, k) * 0.3
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    return torch.einsum("bhts,bshp->bthp", logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)


def test_attention_takes_values_of_every_head_beside_grouped_keys():
    q, k, v = draw(1, 9, 4, 2), draw(1, 9, 2, 2), draw(1, 9, 4, 2)
    found = attention.attention(q, k, v, scale=1.0, window=3)
    assert_close(found, attention.attention(q, k.repeat_interleave(2, 2), v, scale=1.0, window=3))


def test_attention_refuses():
    q = draw(1, 4, 1, 2)
    with pytest.raises(ValueError, match="window of 0 tokens"):
        attention.attention(q, q, q, scale=1.0, window=0)
    with pytest.raises(ValueError, match="2 sinks need"):
        attention.attention(q, q, q, scale=1.0, window=2, sinks=2)
    with pytest.raises(ValueError, match="4 queries cannot be the last of 3 keys"):
        attention.attention(q, q[:, 1:], q[:, 1:], scale=1.0)
    with pytest.raises(ValueError, match="3 heads cannot share 2 key heads"):
        attention.attention(draw(1, 4, 3, 2), draw(1, 4, 2, 2), draw(1, 4, 2, 2), scale=1.0)


def test_attention_never_asks_for_cudnn(monkeypatch):
    """Its backward pass is wrong where the layout of the output's gradient changes: see the reference."""
    allowed = []

    def seen(*inputs, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return torch.zeros_like(inputs[0])

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", seen)
    q = draw(1, 300, 1, 2)
    for options in ({}, {"window": 2}, {"window": 2, "documents": torch.zeros(1, 300, dtype=torch.long)}):
        attention.attention(q, q, q, scale=1.0, **options)
    assert allowed == [False] * 3
