"""Every family as a student: equal to its teacher, unswapped or with plain attention swapped in; and every stage."""

import pytest
import torch

import students
from distill.build import build
from distill.stages.align import Align
from distill.stages.imitate import Imitate
from distill.stages.initialise import Initialise
from distill.stages.orient import Orient
from distill.text.windows import Batch
from students.config import Layout
from students.mixers import MIXERS as TABLE
from tests.teachers.tiny import EVERY, tiny_teacher

MIXERS = {
    "discrete": {"mixer": "discrete_mamba2"},
    "discrete, wide window": {"mixer": "discrete_mamba2", "window": {"size": 6, "sinks": 2}},
    "stock": {"mixer": "mamba2"},
    "gated DeltaNet": {"mixer": "gated_deltanet"},
    "RetNet": {"mixer": "retention"},
    "GLA": {"mixer": "gla"},
    "Longhorn": {"mixer": "longhorn"},
    "stock, 1 group, small state": {"mixer": "mamba2", "n_groups": 1, "d_state": 4, "expand": 1},
    "mamba": {"mixer": "mamba1"},
    "griffin": {"mixer": "rg_lru"},
    "window": {"mixer": "attention", "window": 5, "sinks": 2},
    "Taipan": {"mixer": "mamba2", "window": {"size": 6, "sinks": 0, "lag": False, "gate": "select"}},
    "shared attention": {"mixer": "shared_attention", "rank": 4},
    "split heads": {"mixer": "split_heads", "keep": {1: [0, 1, 5]}},
    "parallel heads": {
        "mixer": "parallel_heads",
        "window": 6,
        "sinks": 2,
        "ssm": {"mixer": "discrete_mamba2", "d_state": 4},
    },
}
MIXERS |= {name: {"mixer": name} for name in TABLE if name not in {options["mixer"] for options in MIXERS.values()}}
WORDS = 96


def text(rows=2, time=20):
    """Rows of two packed documents."""
    documents = torch.zeros(rows, time, dtype=torch.long)
    documents[:, 8:] = 1
    positions = torch.cat([torch.arange(8), torch.arange(time - 8)]).expand(rows, -1)
    ids, weights = torch.randint(1, WORDS, (rows, time + 1)), torch.ones(rows, time)
    weights[:, 7] = 0
    return Batch(ids[:, :-1], documents, positions, ids[:, 1:], weights, documents)


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


def run_stages(teacher, student, transfers, batch):
    """Initialise, then two steps of each training stage that the mixer takes part in."""

    def calibration(tokens):
        return iter([batch])

    Initialise(teacher, student, Initialise.Options(tokens=1), transfers).begin(calibration)
    used, there = transfers[1].used, set(teacher.attention_weights(1).named())
    assert used == there - student.mixers[1].ignores, f"not taken over: {there - used}"
    for kind in (Orient, Align, Imitate):
        options = kind.Options(tokens=1, lr=1e-3, **({"train": "mixers"} if kind is Imitate else {}))
        stage = kind(teacher, student, options)
        stage.prepare()
        parameters = [parameter.requires_grad_(True) for _, parameter in stage.trained().values()]
        if not parameters:
            assert kind is Orient and not student.mixers[1].orientable
            continue
        stage.begin(calibration)
        optimizer = torch.optim.Adam(parameters, 1e-3)
        for _ in range(2):
            for _, loss in stage.losses(batch):
                assert loss.isfinite()
                loss.backward()
            assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters)
            optimizer.step()
            optimizer.zero_grad()
        stage.finish(calibration)
    student.requires_grad_(False)


@torch.no_grad()
def check_documents(student, batch):
    """Packed documents do not see each other."""
    packed = student.hidden(batch.ids, batch.documents)
    for piece in (slice(0, 8), slice(8, 20)):
        alone = student.hidden(batch.ids[:, piece], None)
        assert torch.allclose(packed[:, piece], alone, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def check_generation(student):
    """A cached step is the whole forward; a prompt padded on the left is the prompt."""
    ids = torch.randint(1, WORDS, (1, 9))
    logits, cache = student(ids).logits, student.new_cache()
    pieces = [student(ids[:, start:stop], past_key_values=cache).logits for start, stop in ((0, 5), (5, 6), (6, 9))]
    assert torch.allclose(torch.cat(pieces, 1), logits, atol=1e-4, rtol=1e-3)
    other = torch.randint(1, WORDS, (1, 6))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), other], 1)
    mask = torch.cat([torch.ones(1, 9), (torch.arange(9) >= 3)[None]]).long()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    both = student.generate(
        torch.cat([ids, padded]), attention_mask=mask, return_dict_in_generate=True, pad_token_id=0, **options
    )
    for row, prompt in enumerate((ids, other)):
        alone = student.generate(prompt, return_dict_in_generate=True, pad_token_id=0, **options)
        for found, wanted in zip(both.logits, alone.logits, strict=True):
            assert torch.allclose(found[row], wanted[0], atol=1e-4, rtol=1e-3)
        assert torch.equal(both.sequences[row, 9:], alone.sequences[0, prompt.shape[1] :])
