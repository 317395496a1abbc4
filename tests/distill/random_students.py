"""Tiny students of any family, with distinct values in every parameter, saved as a run saves them."""

import torch

import students
from distill.build import build, layout_of
from distill.stages import adapters
from teachers.families import family_of
from teachers.teacher import Teacher

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def student_of(family, pattern, mixers, *, meta_tokens=0, seed=0, **entries):
    """A student on a random teacher of a family; `entries` are of the teacher's config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **entries})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    teacher = Teacher("tiny", model, None, family_of(config, "tiny"))
    student, _ = build(teacher, layout_of(pattern, mixers, teacher.n_layers, "tiny", meta_tokens))
    return scattered(student)


@torch.no_grad()
def scattered(student):
    """The student with every parameter moved: none keeps a start of 0 or 1 that would hide a mistake."""
    for name, parameter in student.named_parameters():
        if parameter.dim() > 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif name.endswith("dt_bias") or name.endswith("A_log"):
            parameter.copy_(torch.empty_like(parameter).uniform_(-2, 1))
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return student


def saved(student, folder, tokenizer=None):
    """The folder of a student, as a run leaves it."""
    adapters.save(student, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def loaded(folder):
    """The student of a folder, in float32."""
    return students.load(folder).float().eval()
