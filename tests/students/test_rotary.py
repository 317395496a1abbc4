"""Rotary embeddings that change with a text's length: what is generated is what the whole text computed anew comes to."""

from types import SimpleNamespace

import pytest
import torch
from transformers import PretrainedConfig

import students
from students.static_cache import GraphError
from teachers.teacher import Teacher
from tests.students.decoding_cases import student_of
from tests.students.layouts import text
from tests.students.rotary_teachers import LONG, MIXERS, teacher_of


@pytest.mark.parametrize("meta", [0, 5])
@pytest.mark.parametrize("kind", ["phi3", "longrope", "dynamic"])
@torch.no_grad()
def test_generated_across_the_change(kind, meta):
    student = student_of(teacher_of(kind), "MA", MIXERS, meta)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for start in (13, 16, 20):
        wanted = ids = text(1, start)
        for _ in range(5):
            wanted = torch.cat([wanted, student(wanted, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        for more in ({}, {"custom_generate": students.replayed}, {"prefill_chunk_size": 7}):
            assert torch.equal(student.generate(ids, **options, **more), wanted)


@pytest.mark.parametrize("kind", ["phi3", "longrope", "dynamic"])
@torch.no_grad()
def test_a_cache_that_would_be_out_of_date_is_refused(kind):
    teacher = teacher_of(kind)
    student, ids = student_of(teacher, "MA", MIXERS, 3), text(1, 20)
    cache = student(ids[:, :14]).past_key_values
    with pytest.raises(GraphError, match=r"changes after 16 tokens, .* 2 more may follow"):
        students.Decoder(student, cache, 3)
    student(ids[:, 14:16], past_key_values=cache)
    with pytest.raises(ValueError, match="0 more may follow, then compute the whole sequence again"):
        student(ids[:, 16:17], past_key_values=cache)


@torch.no_grad()
def test_meta_tokens_do_not_shift_it():
    """A text of 16 tokens behind meta tokens is rotated by the short factors, one of 17 by the long ones."""
    student, seen = student_of(teacher_of("longrope"), "MA", MIXERS, 5), []
    student.model.rotary_emb.register_forward_hook(lambda module, *rest: seen.append(module.inv_freq.clone()))
    for length in (16, 17):
        student(text(1, length))
        student(text(1, length), document_ids=torch.zeros(1, length, dtype=torch.long))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3]) and not torch.equal(seen[0], seen[2])


@torch.no_grad()
def test_a_dynamic_embedding_forgets_longer_texts():
    student, ids = student_of(teacher_of("dynamic"), "MA", MIXERS), text(1, 20)
    first = student(ids).logits
    student(text(1, 40))
    assert torch.equal(student(ids).logits, first)


def test_lengths_that_a_teacher_serves():
    def served(known, **rope):
        config = PretrainedConfig()
        config.max_position_embeddings, config.rope_parameters = known, rope
        teacher = object.__new__(Teacher)
        teacher.model = SimpleNamespace(config=config)
        return teacher.positions()

    assert served(32, rope_type="yarn", factor=4.0, original_max_position_embeddings=32) == 128
    assert served(128, rope_type="yarn", factor=4.0, original_max_position_embeddings=32) == 128
    assert served(32, rope_type="dynamic", factor=4.0) == 128
    assert served(128, rope_type="linear", factor=4.0) == 128  # as Gemma 3's: the stretched length
    assert served(128, rope_type="linear", factor=4.0, original_max_position_embeddings=64) == 256
    assert served(128, rope_type="llama3", factor=8.0, original_max_position_embeddings=32) == 128
    assert served(128, **LONG) == 128 and served(None) is None
