"""The ops of losses, `matrix_orientation` and `linear_kl`, against their definitions, forward and all gradients."""

import pytest
import torch

from students.kernels import linear_kl, matrix_orientation
from students.kernels.linear_kl import cases as kl_cases
from students.kernels.matrix_orientation import cases as orientation_cases
from tests.students.op_checks import assert_close, assert_same_gradients, draw, packed_documents

# matrix_orientation


@pytest.mark.parametrize("case", orientation_cases.TEST, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_matrix_orientation(case, softcap):
    q, k = draw(case.b, case.t, case.h, case.d, grad=False), draw(case.b, case.t, case.kv, case.d, grad=False)
    C, B, D = draw(case.b, case.t, case.h, case.n), draw(case.b, case.t, case.h, case.n), draw(case.h)
    log_a = (-torch.rand(case.b, case.t, case.h, dtype=torch.float64)).requires_grad_()
    documents = packed_documents(case.b, case.t, case.packed)
    options = {"scale": 0.4, "softcap": softcap, "window": case.window, "min_lag": case.min_lag}
    found = matrix_orientation.orientation_error(q, k, C, B, log_a, D, documents=documents, **options)
    wanted = orientation_by_definition(q, k, C, B, log_a, D, documents, **options)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    assert_same_gradients(found[:1], wanted[:1], (C, B, log_a, D))


def orientation_by_definition(q, k, C, B, log_a, D, documents, scale, softcap, window, min_lag):
    time = q.shape[1]
    ids = torch.zeros(q.shape[:2], dtype=torch.long) if documents is None else documents
    lag = torch.arange(time)[:, None] - torch.arange(time)
    same = ((lag >= 0) & (ids[:, :, None] == ids[:, None]))[:, None]
    logits = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    seen = same if window is None else same & (lag < window)
    A = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    total = log_a.cumsum(1).transpose(1, 2)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~same, -torch.inf).exp()
    M = decay * torch.einsum("bthn,bshn->bhts", C, B) + torch.diag_embed(D[:, None].expand(-1, time))
    counted = lag >= min_lag
    return ((A - M) * counted).square().sum((2, 3)), (A * counted).square().sum((2, 3))


def test_matrix_orientation_memory_is_linear():
    """Twice the length takes about twice the memory, not four times: no t x t tensor is kept for the backward pass."""
    held = [_saved_bytes(time) for time in (512, 1024)]
    assert held[1] < 2.5 * held[0]


def _saved_bytes(time):
    kept = {}  # by storage: every block keeps the same inputs

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    q, C, B, log_a = draw(1, time, 2, 4), draw(1, time, 2, 4), draw(1, time, 2, 4), -torch.rand(1, time, 2).double()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        error, _ = matrix_orientation.orientation_error(q, q, C, B, log_a, scale=1.0)
    assert error.requires_grad
    return sum(kept.values())


# linear_kl


@pytest.mark.parametrize("case", kl_cases.TEST, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(("temperature", "ce_weight", "softcap"), [(1.0, 0.0, None), (2.0, 0.3, None), (1.0, 0.0, 2.0)])
def test_linear_kl(case, divergence, temperature, ce_weight, softcap):
    hidden, weight, bias = draw(case.t, case.d), draw(case.v, case.d), draw(case.v)
    teacher_hidden, teacher_weight = draw(case.t, case.e, grad=False), draw(case.v, case.e, grad=False)
    weights, targets = torch.rand(case.t, dtype=torch.float64) + 0.1, torch.randint(0, case.v, (case.t,))
    heads = linear_kl.Head(weight, bias, 0.7, softcap), linear_kl.Head(teacher_weight)
    found = linear_kl.linear_kl(
        hidden,
        heads[0],
        teacher_hidden,
        heads[1],
        weights,
        targets,
        divergence=divergence,
        temperature=temperature,
        ce_weight=ce_weight,
    )
    logits = 0.7 * (hidden @ weight.T + bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = kl_by_definition(
        logits, teacher_hidden @ teacher_weight.T, weights, targets, divergence, temperature, ce_weight
    )
    assert_close(found, wanted)
    assert_same_gradients((found,), (wanted,), (hidden, weight, bias))


def kl_by_definition(logits, teacher_logits, weights, targets, divergence, temperature, ce_weight):
    student, teacher = ((part / temperature).softmax(-1) for part in (logits, teacher_logits))

    def kl(p, q):
        return (p * (p.log() - q.log())).sum(-1)

    middle = (student + teacher) / 2
    value = {
        "forward_kl": kl(teacher, student),
        "reverse_kl": kl(student, teacher),
        "jsd": (kl(teacher, middle) + kl(student, middle)) / 2,
    }[divergence]
    ce = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    terms = (1 - ce_weight) * temperature**2 * value + ce_weight * ce
    return (weights * terms).sum() / weights.sum()


def test_linear_kl_frozen_head_gets_no_gradient():
    hidden, weight = draw(5, 4), draw(7, 4, grad=False)
    loss = linear_kl.linear_kl(hidden, linear_kl.Head(weight), draw(5, 4, grad=False), linear_kl.Head(weight), torch.ones(5))
    loss.backward()
    assert hidden.grad is not None and weight.grad is None


def test_linear_kl_refuses():
    head, other = linear_kl.Head(draw(7, 4)), linear_kl.Head(draw(8, 4))
    with pytest.raises(ValueError, match="7 entries and the teacher's 8"):
        linear_kl.linear_kl(draw(2, 4), head, draw(2, 4), other, torch.ones(2))
    with pytest.raises(ValueError, match="'mse' is unknown"):
        linear_kl.linear_kl(draw(2, 4), head, draw(2, 4), head, torch.ones(2), divergence="mse")
    with pytest.raises(ValueError, match="no targets"):
        linear_kl.linear_kl(draw(2, 4), head, draw(2, 4), head, torch.ones(2), ce_weight=0.5)
