"""Padding anywhere is as if it were not there: every mixer, whole texts, chunks, `generate` and decoding in place."""

import pytest
import torch

import students
from distill.build import build
from students.config import Layout
from tests.students.decoding_cases import CASES, student_of
from tests.students.layouts import text
from tests.teachers.tiny import supported, tiny_teacher

MASK = torch.tensor(  # gaps, left and right padding, and a row that begins late and ends early
    [
        [1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0],
    ]
)
REAL = MASK.bool()
POSITIONS = (MASK.cumsum(1) - 1).clamp(min=0)
OPTIONS = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SWAPPED = [name for name in CASES if name != "nothing swapped"]
every_case = pytest.mark.parametrize("case", SWAPPED)


def near(found, wanted, tolerance=1e-5):
    """The real tokens of each row beside those of the row alone."""
    errors = [(found[row][REAL[row]] - alone).norm() / alone.norm() for row, alone in enumerate(wanted)]
    return max(errors) < tolerance


def rows_of(ids):
    return [ids[row : row + 1, REAL[row]] for row in range(len(ids))]


@torch.no_grad()
def in_chunks(model, ids, lengths):
    cache, outputs, start = model.new_cache(), [], 0
    for length in lengths:
        stop = start + length
        where = {"attention_mask": MASK[:, :stop], "position_ids": POSITIONS[:, start:stop]}
        outputs.append(model(ids[:, start:stop], past_key_values=cache, **where).logits)
        start = stop
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(outputs, 1)


@every_case
@torch.no_grad()
def test_a_row_is_as_without_its_padding(teacher, case):
    student, ids = student_of(teacher, *CASES[case]), text(4, 14)
    alone = [student(row).logits[0] for row in rows_of(ids)]
    for cached in (False, True):
        where = {"attention_mask": MASK, "position_ids": POSITIONS}
        assert near(student(ids, use_cache=cached, **where).logits, alone)
    for lengths in ((5, 1, 1, 3, 4), (8, 6)):
        assert near(in_chunks(student, ids, lengths), alone)
    wanted = torch.cat([student.generate(row, **OPTIONS)[:, -3:] for row in rows_of(ids)])
    for function in (None, students.replayed):
        found = student.generate(ids, attention_mask=MASK, custom_generate=function, **OPTIONS)
        assert torch.equal(found[:, -3:], wanted)


@pytest.mark.parametrize("case", ["mixed", "shared keys", "griffin"])
@torch.no_grad()
def test_positions_are_those_of_the_teacher(teacher, case):
    """Without position_ids transformers counts padding: a row is as one with the same gaps between its positions."""
    student, ids = student_of(teacher, *CASES[case]), text(4, 14)
    places = [torch.arange(14)[None, REAL[row]] for row in range(4)]
    pairs = zip(rows_of(ids), places, strict=True)
    alone = [student(row, attention_mask=torch.ones_like(row), position_ids=at).logits[0] for row, at in pairs]
    assert near(student(ids, attention_mask=MASK).logits, alone)


@pytest.mark.parametrize(
    "name", ["smollm2-135m-instruct", "gpt2", "pythia-160m", "stablelm-2-1_6b", *["falcon-7b"] * supported("falcon")]
)
@torch.no_grad()
def test_families(name):
    """Nothing swapped is the teacher; with mixers in it, positions that layers are handed tell padding from documents."""
    teacher, ids = tiny_teacher(name), torch.randint(1, 96, (4, 14))
    same, _ = build(teacher, Layout("AA"))
    for where in ({}, {"position_ids": POSITIONS}):
        found, wanted = (model(ids, attention_mask=MASK, **where).logits[REAL] for model in (same, teacher.model))
        assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)
    student = student_of(teacher, "MA", {"M": {"mixer": "mamba2", "window": {"size": 4, "sinks": 2}}})
    alone = [student(row).logits[0] for row in rows_of(ids)]
    assert near(student(ids, attention_mask=MASK, position_ids=POSITIONS, use_cache=False).logits, alone, 1e-4)
    assert near(in_chunks(student, ids, (5, 1, 1, 3, 4)), alone, 1e-4)


@torch.no_grad()
def test_a_window_that_counts_padding_is_refused():
    """transformers' sliding attention looks back columns, not tokens; left padding does no harm."""
    student = student_of(tiny_teacher("mistral-7b-v0.1"), "MA", {"M": {"mixer": "mamba2"}})
    ids = torch.randint(1, 96, (4, 14))
    with pytest.raises(ValueError, match="the window of layer 1's attention"):
        student(ids, attention_mask=MASK)
    student(ids[1:2], attention_mask=MASK[1:2])


def test_gradients_pass_a_gap(teacher):
    student, ids = student_of(teacher, *CASES["windowed"]), text(4, 14)
    student.requires_grad_(True)
    found = []
    for inputs in ([(ids, MASK, POSITIONS)], [(row, torch.ones_like(row), None) for row in rows_of(ids)]):
        student.zero_grad()
        for tokens, mask, positions in inputs:
            out = student(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
            out[mask.bool()].square().sum().backward()
        found.append([each.grad.clone() for each in student.parameters() if each.grad is not None])
    for ours, wanted in zip(*found, strict=True):
        assert (ours - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6
