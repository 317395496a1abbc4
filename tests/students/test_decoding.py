"""Decoding in place: the logits and the cache of ordinary calls, at addresses that stay, asking for no value on the way."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache, StaticCache

import students
from students import capturing, decoding, static_cache
from students.static_cache import GraphError
from tests.students.decoding_cases import (
    CASES,
    FAMILIES,
    MIXERS,
    PROMPTS,
    STEPS,
    check,
    every_case,
    family_models,
    filled,
    near,
    new_cache,
    ordinary,
    padded,
    student_of,
)
from tests.students.layouts import text
from tests.teachers.tiny import EVERY, tiny_teacher


@every_case
def test_a_decoder_is_ordinary_decoding(teacher, case):
    student = student_of(teacher, *CASES[case])
    for rows, prompt in PROMPTS:
        check(student, text(rows, prompt + STEPS + 5), prompt, 1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in EVERY])
def test_families_and_their_teachers(name):
    for model in family_models(name):
        for rows, prompt in PROMPTS:
            check(model, torch.randint(1, 96, (rows, prompt + STEPS + 5)), prompt, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-3.2-1b", *(name for name in FAMILIES if name in EVERY)])
def test_kept_attention_reads_what_it_sees_alone(name, monkeypatch):
    """No mask over what is reserved, padding within the text too, but where a model's attention is its own (Falcon's)."""
    layers = {"num_hidden_layers": len(FAMILIES.get(name, "AA"))}
    model, masks, mask = tiny_teacher(name, **layers).model, [], torch.ones(3, 11, dtype=torch.long)
    ids, caches, make = torch.randint(1, 96, (3, 24)), [new_cache(model) for _ in range(2)], decoding.Decoder._mask
    mask[0, 3:6], mask[1, :4], mask[2, 0], mask[2, 8] = 0, 0, 0, 0
    for cache in caches:
        ordinary(model, ids[:, :11], mask, cache)
    monkeypatch.setattr(decoding.Decoder, "_mask", lambda self, visible: masks.append(visible) or make(self, visible))
    before = model.config._attn_implementation
    decode = students.Decoder(model, caches[1], 40, mask)
    masks.clear()
    for at in range(11, 24):
        near(decode(ids[:, at : at + 1]), ordinary(model, ids[:, at : at + 1], mask, caches[0]), 1e-4)
        assert model.config._attn_implementation == before
    assert bool(masks) == (name == "falcon-7b")


def gpt_oss():
    """Its attention has a logit of its own beside those of the keys."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "max_position_embeddings": 64}
    return GptOssForCausalLM(GptOssConfig(num_hidden_layers=2, **sizes, **heads, **rope)).eval()


def deepseek():
    """Its keys are wider than its values, and a cache holds something smaller than both."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 2,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 8}
    widths = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "max_position_embeddings": 64}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **widths)).eval()


@torch.no_grad()
@pytest.mark.parametrize("make", [gpt_oss, deepseek])
def test_attention_that_is_its_models_own(make):
    model = make()
    for rows, prompt in PROMPTS:
        ids = torch.randint(1, 96, (rows, prompt + STEPS + 5))
        check(model, ids, prompt, 1e-4)


class NoValues(TorchDispatchMode):
    """Refuses what a GPU would be waited for, or what would bring numbers from the CPU."""

    refused = ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.__name__.partition(".")[0]
        assert name not in self.refused, name
        return function(*arguments, **keywords or {})


# Falcon's own attention indexes by a list.
@pytest.mark.parametrize("case", [*CASES, *(name for name in FAMILIES if name != "falcon-7b")])
@torch.no_grad()
def test_a_token_asks_for_no_value(teacher, case):
    models = family_models(case) if case in FAMILIES else [student_of(teacher, *CASES[case])]
    for model in models:
        cache = new_cache(model)
        ids, mask = torch.randint(1, 96, (2, 9)), padded(2, 9)
        ordinary(model, ids, mask, cache)
        decode = students.Decoder(model, cache, 3, mask)
        with NoValues():
            decode._step()


def test_what_a_decoder_refuses(teacher):
    student = student_of(teacher, "MA", MIXERS)
    ids = text(2, 6)
    with pytest.raises(ValueError, match="the cache holds 0 tokens"):
        students.Decoder(student, student.new_cache(), 4)
    cache = student(ids).past_key_values
    with pytest.raises(ValueError, match="cover the 6 tokens in the cache"):
        students.Decoder(student, cache, 4, torch.ones(2, 7, dtype=torch.long))
    decode = students.Decoder(student, cache, 1)
    decode(ids[:, :1])
    with pytest.raises(ValueError, match="make a new Decoder with more tokens"):
        decode(ids[:, :1])
    with pytest.raises(GraphError, match="layer 0 of the cache is a StaticLayer"):
        static = StaticCache(config=teacher.model.config, max_cache_len=9)
        students.Decoder(teacher.model, filled(teacher.model, ids, static), 2)
    sliding = tiny_teacher("mistral-7b-v0.1").model  # a cache that grows, in a model that looks back 7 tokens
    with pytest.raises(GraphError, match="layer 0 of the cache is a DynamicLayer"):
        students.Decoder(sliding, filled(sliding, ids % 96, DynamicCache()), 2)
    teacher.model.config._attn_implementation = "flex_attention"
    with pytest.raises(GraphError, match="flex_attention attention"):
        students.Decoder(teacher.model, filled(teacher.model, ids, DynamicCache(), "sdpa"), 2)


def test_a_model_that_makes_its_own_masks_is_refused():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "window_size": 8}
    model = GPTNeoForCausalLM(GPTNeoConfig(attention_types=[[["global", "local"], 1]], **sizes)).eval()
    with pytest.raises(GraphError, match="GPTNeoForCausalLM makes its own masks"):
        students.Decoder(model, filled(model, text(1, 6) % 96, DynamicCache(config=model.config)), 2)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["MA", "MM"])
def test_nobody_else_uses_a_held_cache(teacher, pattern):
    """What a call or a reordering would do to it the decoder could not undo: each is refused, and changes nothing."""
    student = student_of(teacher, pattern, MIXERS)
    ids, caches = text(2, 12), [student.new_cache() for _ in range(2)]
    for cache in caches:
        ordinary(student, ids[:, :9], None, cache)
    decode = students.Decoder(student, caches[0], 3)
    changes = (
        lambda: student(ids[:, 9:10], past_key_values=caches[0]),
        lambda: student(ids[:, 9:11], past_key_values=caches[0]),
        lambda: caches[0].reorder_cache(torch.tensor([1, 0])),
        lambda: caches[0].batch_select_indices(torch.tensor([0])),
        lambda: caches[0].batch_repeat_interleave(2),
        lambda: caches[0].reset(),
    )
    for change in changes:
        with pytest.raises(RuntimeError, match="a Decoder holds this cache"):
            change()
    for at in (9, 10):
        near(decode(ids[:, at : at + 1]), ordinary(student, ids[:, at : at + 1], None, caches[1]), 1e-5)
    decode.release()
    caches[0].reorder_cache(torch.tensor([1, 0]))


@torch.no_grad()
@pytest.mark.parametrize("call", range(4))
def test_memory_that_runs_out_leaves_the_cache_as_it_was(teacher, call, monkeypatch):
    student = student_of(teacher, "MAAW", MIXERS)
    ids, caches = text(2, 12), [student.new_cache() for _ in range(2)]
    for cache in caches:
        ordinary(student, ids[:, :9], None, cache)
    laid, calls = static_cache.Ring.laid, []

    def full(self, part):
        calls.append(part)
        if len(calls) == call + 1:
            raise torch.OutOfMemoryError
        return laid(self, part)

    monkeypatch.setattr(static_cache.Ring, "laid", full)
    with pytest.raises(torch.OutOfMemoryError):
        students.Decoder(student, caches[0], 3)
    for at in (9, 10):
        near(*(ordinary(student, ids[:, at : at + 1], None, cache) for cache in caches), 1e-6)


def test_what_cannot_be_captured_is_named(teacher):
    """The model, the line, and what to do; a lack of memory stays one."""
    said = r"LlamaForCausalLM cannot .*test_decoding.py, line \d+, 'raise .*: a wait;"
    with pytest.raises(GraphError, match=said), capturing.explained(teacher.model):
        raise RuntimeError("a wait\nand more")
    with pytest.raises(torch.OutOfMemoryError), capturing.explained(teacher.model):
        raise torch.OutOfMemoryError
