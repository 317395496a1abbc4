"""Fingerprints: two teachers that differ in weights, config or tokenizer have two, and the words say in what."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from teachers.families import FAMILIES
from teachers.fingerprint import difference
from teachers.teacher import Teacher
from tests.teachers.tiny import tiny_teacher

SIZES = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def word(tokenizer, dtype=torch.float32, **entries):
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | entries)).bfloat16().to(dtype)  # values that both types have
    return Teacher("x", model, tokenizer, FAMILIES["llama"]).fingerprint


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 1e-5},
        {"max_position_embeddings": 4096},
        {"attention_dropout": 0.1},
        {"eos_token_id": 7},
    ],
    ids=str,
)
def test_a_config_alone(tokenizer, entries):
    assert difference(word(tokenizer), word(tokenizer, **entries)) == "config"


@pytest.mark.parametrize(
    "entries", [{"layer_norm_eps": 1e-3}, {"use_parallel_residual": False}, {"rotary_pct": 0.5}], ids=str
)
def test_a_config_of_another_family(entries):
    teacher = tiny_teacher("pythia-160m")
    other = copy.copy(teacher)
    other.model = type(teacher.model)(type(teacher.config)(**teacher.config.to_dict() | {"rope_parameters": None} | entries))
    other.model.load_state_dict(teacher.model.state_dict())
    assert difference(teacher.fingerprint, other.fingerprint) == "config"


def test_what_a_config_says_of_other_things_does_not_count(tokenizer):
    words = [word(tokenizer), word(tokenizer, torch.bfloat16), word(tokenizer, use_cache=False, _name_or_path="elsewhere")]
    assert len(set(words)) == 1


def changed(tokenizer, change):
    """A copy of a tokenizer, its own JSON changed."""
    import json

    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<end>", pad_token="<end>"
    )


def fewer_merges(content):
    content["model"]["merges"] = content["model"]["merges"][:-5]


def lower_case(content):
    content["normalizer"] = {"type": "Lowercase"}


def a_space_before_all(content):
    content["pre_tokenizer"]["add_prefix_space"] = True


def another_order_of_merges(content):
    content["model"]["merges"].reverse()


def an_opening(content):
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<end>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<end>": {"id": "<end>", "ids": [0], "tokens": ["<end>"]}},
    }


@pytest.mark.parametrize("change", [fewer_merges, another_order_of_merges, lower_case, a_space_before_all, an_opening])
def test_a_tokenizer_alone(tokenizer, change):
    assert difference(word(changed(tokenizer, lambda content: None)), word(changed(tokenizer, change))) == "tokenizer"


def test_tokens_that_were_added_or_are_called_otherwise(tokenizer):
    plain = word(changed(tokenizer, lambda content: None))
    more, other = (changed(tokenizer, lambda content: None) for _ in range(2))
    more.add_tokens(["<x>"])
    other.bos_token = "<end>"
    assert difference(plain, word(more)) == difference(plain, word(other)) == "tokenizer"
    asked = changed(tokenizer, lambda content: None)
    asked(["a", "b c"], padding=True, truncation=True, max_length=2)  # leaves its mark on the tokenizer's own JSON
    assert word(asked) == plain


def test_words_of_earlier_versions_knew_only_weights(tokenizer):
    now = word(tokenizer)
    assert difference(now.partition("-")[0], now) is None and difference("0" * 16, now) == "weights"
