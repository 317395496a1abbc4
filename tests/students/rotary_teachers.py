"""Teachers whose rotary positions are scaled in every way, and mixers that use them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import students
from teachers.families import FAMILIES
from teachers.teacher import Teacher

SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 3.0, 5.0, 9.0], "rope_theta": 1e4}
LONG |= {"original_max_position_embeddings": 16, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
MIXERS = {"M": {"mixer": "mamba2", "window": {"size": 24, "sinks": 2}}}


def teacher_of(kind):
    torch.manual_seed(2)
    if kind == "phi3":
        known = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
        return Teacher(
            kind, Phi3ForCausalLM(Phi3Config(**SIZES, **known, rope_parameters=dict(LONG))).eval(), None, FAMILIES[kind]
        )
    rope, known = (LONG, 64) if kind == "longrope" else (DYNAMIC, 16)
    config = LlamaConfig(**SIZES, max_position_embeddings=known, rope_parameters=dict(rope))
    made = Teacher(kind, LlamaForCausalLM(config).eval(), None, FAMILIES["llama"])
    students.rotary.forget_lengths(made.model)
    return made
