"""The divergence from the likeliest tokens and the rest: value, gradients, what it is a lower bound of, and memory."""

import pytest
import torch
from torch import nn

from students.kernels.linear_kl import Head, linear_kl, sparse_kl
from students.kernels.linear_kl.reference import logits_of
from students.kernels.linear_kl.sparse import bucket_losses

T, V, D, K = 37, 29, 6, 5


def drawn(dtype=torch.float64, k=K, temperature=1.0, scale=1.0, softcap=None):
    """Hidden states and a head of a student, and what is known of a teacher: (hidden, weight, bias), head maker, known."""
    leaves = [torch.randn(T, D, dtype=dtype), torch.randn(V, D, dtype=dtype), torch.randn(V, dtype=dtype)]
    teacher_hidden, teacher_head = torch.randn(T, D, dtype=dtype), Head(2 * torch.randn(V, D, dtype=dtype))
    log_p = (logits_of(teacher_hidden, teacher_head) / temperature).log_softmax(-1)
    logs, ids = log_p.topk(k)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return leaves, lambda weight, bias: Head(weight, bias, scale, softcap), (ids, logs, rest), (teacher_hidden, teacher_head)


def by_definition(hidden, head, known, weights, targets, temperature, ce_weight):
    """The loss from whole softmaxes, bucket by bucket."""
    ids, logs, rest = known
    logits = logits_of(hidden, head)
    q = (logits / temperature).softmax(-1)
    inside = q.gather(-1, ids)
    kl = (logs.exp() * (logs - inside.log())).sum(-1) + rest.exp() * (rest - (1 - inside.sum(-1)).log())
    entropy = -logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return (weights * ((1 - ce_weight) * temperature**2 * kl + ce_weight * entropy)).sum() / weights.sum()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 4.0)])
@pytest.mark.parametrize("called", [False, True])
def test_value_and_gradients(temperature, ce_weight, scale, softcap, called):
    leaves, _, known, _ = drawn(temperature=temperature)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    weights, targets = torch.rand(T, dtype=torch.float64), torch.randint(V, (T,))
    hidden, weight, bias = leaves
    given = Head(weight, bias, scale, softcap)
    wanted = by_definition(hidden, given, known, weights, targets, temperature, ce_weight)
    if called:
        given = Head(None, None, scale, softcap, lambda states: nn.functional.linear(states, weight, bias))
    options = {"temperature": temperature, "ce_weight": ce_weight, "rows": 10}  # of 37: the last chunk is shorter
    found = sparse_kl(hidden, given, *known, weights, targets, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(3 * found, leaves), torch.autograd.grad(3 * wanted, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def test_a_lower_bound_that_grows_to_the_whole():
    """For every k it is at most the KL over the vocabulary, it grows with k, and with one token left it is that KL."""
    values = []
    for k in (1, 3, 9, V - 1):
        torch.manual_seed(5)
        (hidden, weight, bias), head, known, teacher = drawn(k=k)
        weights = torch.ones(T, dtype=torch.float64)
        whole = linear_kl(hidden, head(weight, bias), *teacher, weights)
        values.append(sparse_kl(hidden, head(weight, bias), *known, weights).item())
    assert values == sorted(values) and values[-2] < whole.item()
    assert values[-1] == pytest.approx(whole.item(), rel=1e-10)


def test_shares_within_the_rest_have_no_gradient():
    """Where the student has the teacher's buckets, nothing is left to learn, whatever its shares within the rest."""
    _, _, (ids, logs, rest), _ = drawn()
    logits = torch.randn(T, V, dtype=torch.float64)
    others = logits.scatter(-1, ids, -torch.inf)
    logits = (others.log_softmax(-1) + rest[:, None]).scatter(-1, ids, logs).requires_grad_()
    losses = bucket_losses(logits, ids, logs, rest, None, 1.0, 0.0)
    torch.testing.assert_close(losses, torch.zeros_like(losses), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.abs().max() < 1e-12


def test_rounded_probabilities_are_made_whole():
    """What float16 rounds does not sum to 1; the loss of a student equal to the teacher is still 0 at least, and small."""
    (hidden, _, _), _, _, _ = drawn(torch.float32)
    head = Head(torch.randn(V, D))
    log_p = logits_of(hidden, head).log_softmax(-1)
    logs, ids = log_p.topk(K)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    found = sparse_kl(hidden, head, ids, logs.half(), rest.half(), torch.ones(T)).item()
    assert -1e-6 <= found < 1e-5


def test_extremes_stay_finite():
    """A teacher that is certain, one that leaves nothing for the rest, and a student that is certain of something else."""
    ids = torch.tensor([[0, 1]] * 3)
    logs = torch.tensor([[0.0, -40.0], [-0.7, -0.7], [-1.0, -2.0]])
    rest = torch.tensor([-50.0, -torch.inf, -0.5])
    weight = torch.zeros(6, 2, requires_grad=True)
    hidden = torch.tensor([[1.0, 0.0]] * 3, requires_grad=True)
    with torch.no_grad():
        weight[3, 0] = 200.0
    loss = sparse_kl(hidden, Head(weight), ids, logs, rest, torch.ones(3))
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all() and hidden.grad.isfinite().all()


def test_no_logits_of_a_batch():
    """Of 4,096 tokens and 2,000 entries no array has more than a chunk's; and half precision goes through autocast."""
    hidden, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(2000, 8, requires_grad=True)
    ids, logs = torch.arange(4).expand(4096, 4), torch.full((4096, 4), -2.0)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        sparse_kl(hidden, Head(weight), ids, logs, torch.full((4096,), -1.0), torch.ones(4096), rows=128).backward()
    assert largest <= 128 * 2000
    exact = hidden.grad.clone()
    hidden.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        sparse_kl(hidden, Head(weight), ids, logs, torch.full((4096,), -1.0), torch.ones(4096)).backward()
    assert (hidden.grad - exact).norm() < 2e-2 * exact.norm()


def test_labels_are_needed():
    (hidden, weight, bias), head, known, _ = drawn()
    with pytest.raises(ValueError, match=r"ce_weight is 0\.5, but there are no targets"):
        sparse_kl(hidden, head(weight, bias), *known, torch.ones(T), ce_weight=0.5)
