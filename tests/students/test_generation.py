"""transformers' `generate` through a decoder says what it says without one."""

from functools import partial

import pytest
import torch
from transformers.generation.stopping_criteria import EosTokenCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import students
from tests.students.decoding_cases import CASES, padded, student_of
from tests.students.layouts import text

HOW = {"greedy": {}, "sampling": {"do_sample": True, "top_k": 20}, "chunks": {"prefill_chunk_size": 5}}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", ["stock", "hymba", "kept and sinks"])
def test_generate(teacher, case, how):
    student = student_of(teacher, *CASES[case])
    ids, mask = text(2, 13), padded(2, 13)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **HOW[how]}
    made = []
    for function in (None, students.replayed):
        torch.manual_seed(3)
        made.append(student.generate(ids, custom_generate=function, **options))
    assert torch.equal(*made)


def test_generate_stops_streams_and_teaches(teacher):
    """A teacher's, each row to its own end, token by token to a streamer."""
    ids, options = text(2, 9), {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 20}
    whole = teacher.model.generate(ids, eos_token_id=None, **options)
    ends = [int(whole[0, 12]), int(whole[1, 17])]
    wanted = teacher.model.generate(ids, eos_token_id=ends, **options)
    assert torch.equal(teacher.model.generate(ids, eos_token_id=ends, custom_generate=students.replayed, **options), wanted)

    class Streamer(BaseStreamer):
        def __init__(self):
            self.seen = []

        def put(self, tokens):
            self.seen.append(tokens.flatten().tolist())

        def end(self):
            self.seen.append("end")

    streamer = Streamer()
    replayed = partial(students.replayed, streamer=streamer)
    teacher.model.generate(ids[:1], eos_token_id=None, streamer=streamer, custom_generate=replayed, **options)
    assert streamer.seen == [ids[0].tolist(), *([token] for token in whole[0, 9:].tolist()), "end"]


def test_ends_that_a_criterion_knows(teacher):
    ids, options = text(2, 9), {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12, "eos_token_id": None}
    whole = teacher.model.generate(ids, **options)
    stop = StoppingCriteriaList([EosTokenCriteria(int(whole[0, 11]))])
    made = [
        teacher.model.generate(ids, stopping_criteria=stop, custom_generate=f, **options) for f in (None, students.replayed)
    ]
    assert torch.equal(*made)


def test_a_prompts_logits_are_its_last_tokens(teacher, monkeypatch):
    """`generate` asks students too for these alone: a prompt's whole would be gigabytes."""
    student, seen = student_of(teacher, *CASES["hymba"]), []
    student.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    student.generate(text(2, 9), max_new_tokens=3, do_sample=False, pad_token_id=0, custom_generate=students.replayed)
    assert set(seen) == {1}


@pytest.mark.parametrize("function", [None, students.replayed])
def test_a_cache_is_used_whatever_training_left_in_the_config(teacher, tmp_path, function):
    """Unless a call says otherwise; no token but the prompt's goes through twice."""
    student = student_of(teacher, *CASES["hymba"])
    student.config.use_cache = student.generation_config.use_cache = False
    student.save_pretrained(tmp_path)
    student, ids, seen = students.load(tmp_path), text(2, 9), []
    assert student.config.use_cache is False
    student.lm_head.register_forward_pre_hook(lambda module, arguments: seen.append(student.model.last_size))
    student.model.register_forward_pre_hook(
        lambda module, a, k: setattr(
            module, "last_size", (k.get("input_ids") if k.get("inputs_embeds") is None else k["inputs_embeds"]).shape[1]
        ),
        with_kwargs=True,
    )
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = student.generate(ids, custom_generate=function, **options)
    assert seen[0] == 14 and set(seen[1:]) == {1} and len(seen) <= 4  # a decoder may try a token first
    seen.clear()
    assert torch.equal(made, student.generate(ids, use_cache=False, **options))
    assert seen == [14, 15, 16]
    model = teacher.model
    model.generation_config.use_cache = False
    assert torch.equal(
        model.generate(ids, custom_generate=function, **options), model.generate(ids, use_cache=True, **options)
    )


def test_what_it_refuses(teacher):
    ids = text(2, 6)
    options = {"max_new_tokens": 3, "pad_token_id": 0, "custom_generate": students.replayed}
    with pytest.raises(ValueError, match="not contrastive_search"):
        teacher.model.generate(ids, penalty_alpha=0.6, top_k=4, **options)
    with pytest.raises(ValueError, match="leave out position_ids"):
        teacher.model.generate(ids, position_ids=torch.arange(7, 13)[None].expand(2, -1), **options)
    for name, value in {"num_beams": 2, "return_dict_in_generate": True}.items():
        with pytest.raises(ValueError, match=f"{name}={value}"):
            teacher.model.generate(ids, max_new_tokens=2, pad_token_id=0, custom_generate=students.replayed, **{name: value})
