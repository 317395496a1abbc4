"""Every family as a student: equal to its teacher, unswapped or with plain attention swapped in; and every stage."""

import pytest
import torch

import students
from distill.build import build
from students.config import Layout
from tests.distill.family_checks import MIXERS, check_documents, check_generation, run_stages, text
from tests.teachers.tiny import EVERY, tiny_teacher


@pytest.mark.parametrize("name", EVERY)
def test_nothing_swapped_is_the_teacher(name):
    teacher, batch = tiny_teacher(name), text()
    student, _ = build(teacher, Layout.over(2, "A", {}))
    assert torch.equal(student.hidden(batch.ids, batch.documents), teacher.hidden(batch.ids, batch.positions))
    assert torch.equal(student(batch.ids).logits, teacher.model(batch.ids).logits)


@pytest.mark.parametrize("name", EVERY)
def test_attention_swapped_for_attention_is_the_teacher(name):
    teacher, batch = tiny_teacher(name), text()
    student, _ = build(teacher, Layout.over(2, "W", {"W": {"mixer": "attention"}}))
    found, wanted = student.hidden(batch.ids, batch.documents), teacher.hidden(batch.ids, batch.positions)
    assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.matrix
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", EVERY)
def test_a_conversion(name, mixer, tmp_path):
    teacher, batch = tiny_teacher(name), text()
    student, transfers = build(teacher, Layout.over(2, "AM", {"M": MIXERS[mixer]}))
    run_stages(teacher, student, transfers, batch)
    kept, now = teacher.model.state_dict(), student.state_dict()
    assert all(torch.equal(now[key], kept[key]) for key in kept.keys() & now.keys())  # experts, norms, embeddings ...
    check_documents(student, batch)
    check_generation(student)
    before = student(batch.ids).logits
    student.save_pretrained(tmp_path)
    again = students.load(tmp_path).eval()
    assert all(torch.equal(tensor, now[key]) for key, tensor in again.state_dict().items())
    # to the last bit but for mixtures of experts, whose grouped product rounds by where its weights lie in memory
    assert torch.allclose(again(batch.ids).logits, before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in EVERY if name in ("mixtral-8x7b-v0.1", "qwen3-30b-a3b")])
def test_blackmamba_keeps_the_experts(name):
    """BlackMamba (arXiv 2402.01771) is a state space in every layer, each before a mixture of experts: of a teacher that has
    one, experts and router stay the teacher's own tensors, also once the mixers were trained."""
    teacher, batch = tiny_teacher(name), text()
    student, transfers = build(teacher, Layout.over(2, "M", {"M": {"mixer": "mamba2"}}))
    run_stages(teacher, student, transfers, batch)
    mine, theirs = dict(student.named_parameters()), dict(teacher.model.named_parameters())
    experts = [key for key in theirs if ".experts." in key or ".mlp.gate." in key]
    assert len(experts) >= 2 * 3  # a router and two projections in each layer
    assert all(mine[key].data_ptr() == theirs[key].data_ptr() for key in experts)
    assert not any("self_attn.q_proj" in key for key in mine)
