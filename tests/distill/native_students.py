"""Random students that are exported to transformers' own classes, and how far the export is from them."""

import torch

from distill.exporters import target
from distill.exporters.target import Form
from tests.distill.random_students import saved, student_of

EXACT = 1e-4  # of logits, in float32
M = {"mixer": "mamba2"}
ONE = M | {"n_groups": 1}  # the same function in every supported transformers
LLAMA3 = {
    "rope_theta": 10000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.21,
    "logits_scaling": 1.7,
}
ZAMBA = {"M": M, "S": {"mixer": "shared_attention", "rank": 3}}
STUDENTS = {
    "llama, tied": ("llama", "AMMM", {"M": M}, {"tie_word_embeddings": True}),
    "llama, untied, attention first and last": ("llama", "AMMA", {"M": M}, {}),
    "llama, one group": ("llama", "MMAM", {"M": M | {"n_groups": 1, "expand": 1}}, {}),
    "llama, two groups, wide state, three taps": (
        "llama",
        "MAMM",
        {"M": M | {"n_groups": 2, "d_state": 12, "d_conv": 3}},
        {},
    ),
    "llama, expand 1, one tap": ("llama", "AMMM", {"M": M | {"expand": 1, "d_conv": 1}}, {}),
    "llama 3's rope": ("llama", "AMMM", {"M": ONE}, {"rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", "AMMM", {"M": M}, {"rope_parameters": YARN}),
    "llama, heads of their own width": ("llama", "AMMM", {"M": M}, {"head_dim": 16}),
    "llama, narrow heads, filled up": ("llama", "AMMM", {"M": M | {"expand": 1}}, {"head_dim": 6, "hidden_size": 36}),
    "llama, all biases": ("llama", "AMMM", {"M": M}, {"attention_bias": True}),
    "llama, attention as a mixer": ("llama", "WMMM", {"M": M | {"d_conv": 6}, "W": {"mixer": "attention"}}, {}),
    "llama, no rope": ("llama", "WMMM", {"M": M, "W": {"mixer": "attention", "rope": False}}, {}),
    "qwen2": ("qwen2", "AMMM", {"M": M}, {"tie_word_embeddings": True}),
    "qwen2, windows in converted layers": (
        "qwen2",
        "AMMM",
        {"M": ONE},
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
    ),
    "granite": ("granite", "AMMM", {"M": M}, GRANITE),
    "granite, tied, biases": (
        "granite",
        "AMMM",
        {"M": ONE},
        GRANITE | {"tie_word_embeddings": True, "attention_bias": True},
    ),
    "mistral": ("mistral", "AMMM", {"M": M}, {"sliding_window": None, "head_dim": 8}),
    "mistral, a window that never bites": ("mistral", "AMMM", {"M": ONE}, {"sliding_window": 256}),
    "smollm3": ("smollm3", "AMMM", {"M": M}, {"no_rope_layers": [1, 0, 1, 0]}),
    "smollm3, all kept without rope": ("smollm3", "AMMM", {"M": M}, {"no_rope_layers": [0, 1, 1, 1]}),
    "zamba": ("llama", "MSMS", ZAMBA, {}),
    "zamba, two blocks, biases": (
        "qwen2",
        "SSSM",
        {"M": M, "S": {"mixer": "shared_attention", "rank": 2, "blocks": 2}},
        {},
    ),
    "zamba without deltas": ("llama", "MSMS", {"M": ONE, "S": {"mixer": "shared_attention", "rank": 0}}, {}),
    "mixtral": ("mixtral", "AMMM", {"M": M}, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, one of three": ("mixtral", "MMMA", {"M": ONE}, {"num_local_experts": 3, "num_experts_per_tok": 1}),
}


def exported(name, place, dtype="float32", tokenizer=None):
    family, pattern, mixers, entries = STUDENTS[name]
    student = student_of(family, pattern, mixers, **entries)
    folder = saved(student, place / "student", tokenizer)
    target("native").write(folder, place / "native", Form(dtype))
    return folder, place / "native"


def plain(folder):
    """What anyone loads: no code of ours, no remote code, every tensor found and none left over."""
    from transformers import AutoModelForCausalLM

    model, said = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model).__module__.startswith("transformers.models.")
    assert not any(said[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def furthest(student, model, ids):
    """The largest difference of logits: of whole texts, token by token behind a cache, and padded on the left."""
    wanted = student(ids).logits
    begun, steps = model(ids[:, :7], use_cache=True), []
    cache = next(part for name in ("past_key_values", "cache") if (part := begun.get(name)) is not None)
    for position in range(7, ids.shape[1]):
        steps.append(model(ids[:, position : position + 1], past_key_values=cache).logits)
    padded = torch.cat([torch.full((len(ids), 3), 5), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    left = model(padded, attention_mask=mask).logits[:, 3:]
    assert wanted.std() > 0.1
    found = (model(ids).logits, torch.cat([begun.logits, *steps], 1), left)
    return max((logits - wanted).abs().max().item() for logits in found)
