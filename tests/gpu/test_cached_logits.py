"""On a GPU: the loss from a teacher's likeliest tokens against float64; memory is free while the teacher is aside."""

import pytest
import torch

from distill.benchmarks.steps import random_teacher
from distill.build import build
from distill.stages.imitate import Imitate
from distill.training.aside import Aside, own_weights
from students.config import Layout
from students.kernels.linear_kl import Head, sparse_kl
from students.kernels.linear_kl.reference import logits_of

pytestmark = pytest.mark.gpu
T, V, D, K = 3000, 20_000, 256, 128


def drawn():
    """A student's hidden states and head in float64, and what is known of a teacher."""
    hidden, weight = torch.randn(T, D, device="cuda").double(), torch.randn(V, D, device="cuda").double() * 2 * D**-0.5
    log_p = logits_of(torch.randn(T, D, device="cuda"), Head(torch.randn(V, D, device="cuda") * 2 * D**-0.5)).log_softmax(-1)
    logs, ids = log_p.topk(K)
    return hidden, weight, (ids, logs, log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)), torch.rand(T, device="cuda")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_against_float64(dtype, tolerance, ce_weight):
    torch.set_float32_matmul_precision("highest")
    hidden, weight, known, weights = drawn()
    targets, found = torch.randint(V, (T,), device="cuda"), {}
    for kind in (torch.float64, dtype):
        leaves = [part.detach().to(kind, copy=True).requires_grad_() for part in (hidden, weight)]
        loss = sparse_kl(leaves[0], Head(leaves[1]), *known, weights, targets, ce_weight=ce_weight, rows=1000)
        loss.backward()
        found[kind] = [loss.double(), *(leaf.grad.double() for leaf in leaves)]
    for ours, theirs in zip(found[dtype], found[torch.float64], strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_memory_is_free_while_the_teacher_is_aside():
    """Its weights leave the GPU and come back the same; what the student shares never moves."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
    teacher = random_teacher(LlamaConfig(vocab_size=8192, **sizes), torch.device("cuda"))
    student, _ = build(teacher, Layout.over(8, "AM", {"M": {"mixer": "discrete_mamba2"}}))
    ids = torch.randint(8192, (1, 64), device="cuda")
    before = teacher.hidden(ids, torch.arange(64, device="cuda")[None])
    for train in ("mixers", "all"):
        stage = Imitate(teacher, student, Imitate.Options(tokens=1, lr=1.0, train=train))
        stage.prepare()
        own = own_weights(teacher.model, student)
        size, held, aside = sum(p.numel() * p.element_size() for p in own), torch.cuda.memory_allocated(), Aside(teacher)
        shared = [p.data_ptr() for p in teacher.model.parameters() if all(p is not each for each in own)]
        with aside.away(student):
            assert held - torch.cuda.memory_allocated() >= size
            with aside.back():
                torch.testing.assert_close(teacher.hidden(ids, torch.arange(64, device="cuda")[None]), before)
            assert held - torch.cuda.memory_allocated() >= size
        assert [p.data_ptr() for p in teacher.model.parameters() if all(p is not each for each in own)] == shared
        assert torch.equal(teacher.hidden(ids, torch.arange(64, device="cuda")[None]), before)
