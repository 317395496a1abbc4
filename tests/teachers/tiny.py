"""A tiny random teacher a family, made from the config of a published model: smaller everywhere, otherwise as published."""

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM

from distill.shipped import shipped_folder
from teachers.families import FAMILIES, family_of
from teachers.teacher import Teacher

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# Beyond SMALL, what single families need: windows shorter than the test's texts, few experts, their own names for sizes.
SMALLER = {
    "mistral": {"sliding_window": 7},
    "phi3": {"sliding_window": 7},
    "mixtral": {"sliding_window": 7, "num_local_experts": 4},
    "gemma2": {"sliding_window": 7, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 7, "query_pre_attn_scalar": 12, "num_key_value_heads": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
    "phi": {"num_key_value_heads": 6},
    "falcon": {"num_kv_heads": 2, "ffn_hidden_size": 64},
    "gpt2": {"n_positions": 256, "n_inner": 64},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
CHECKPOINTS = {
    "llama": ["llama-3.2-1b", "meta-llama-3-8b-instruct", "smollm2-135m-instruct"],
    "smollm3": ["smollm3-3b"],
    "mistral": ["mistral-7b-v0.1"],
    "granite": ["granite-3.1-2b-base"],
    "qwen2": ["qwen2.5-0.5b"],
    "qwen3": ["qwen3-0.6b"],
    "phi": ["phi-1_5"],
    "phi3": ["phi-3-mini-4k-instruct"],
    "gemma2": ["gemma-2-2b"],
    "gemma3_text": ["gemma-3-270m"],
    "gpt_neox": ["pythia-160m"],
    "falcon": ["falcon-7b", "falcon-11b"],
    "gpt2": ["gpt2"],
    "olmo2": ["olmo-2-0425-1b"],
    "stablelm": ["stablelm-2-1_6b", "stablelm-2-12b"],
    "cohere": ["aya-23-8b", "c4ai-command-r-plus"],
    "mixtral": ["mixtral-8x7b-v0.1"],
    "qwen3_moe": ["qwen3-30b-a3b"],
}
ALL = [name for names in CHECKPOINTS.values() for name in names]


def supported(family):
    """Whether the installed transformers is new enough for a family."""
    since = FAMILIES[family].since
    return since is None or Version(transformers.__version__) >= Version(since)


EVERY = [name for family, names in CHECKPOINTS.items() if supported(family) for name in names]


def tiny_model(name, **changes):
    """A random model with a checkpoint's config, cut down; every parameter random, norms and biases too."""
    config = AutoConfig.from_pretrained(shipped_folder() / "configs" / f"{name}.json")
    entries = {key: value for key, value in config.to_dict().items() if key != "layer_types"}
    small = {**SMALL, **SMALLER.get(config.model_type, {}), **changes}
    if config.model_type == "falcon":
        del small["head_dim"]  # there a property of the other sizes
    config = type(config)(**{**entries, **small})
    family = family_of(config, name)
    attention = {} if family.attention is None else {"attn_implementation": family.attention}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention).eval()
    for parameter in model.parameters():  # where biases are 0 and norms are 1, a wrong one would not show
        parameter.data.normal_(0, 0.2)
    return model


def tiny_teacher(name, tokenizer=None, **changes):
    """`tiny_model` as a teacher."""
    model = tiny_model(name, **changes)
    return Teacher(name, model, tokenizer, family_of(model.config, name))
