"""Random students of every architecture that GGUF files hold, and their exports."""

from distill.exporters import target
from distill.exporters.target import Form
from tests.distill.native_students import GRANITE, LLAMA3, YARN, ZAMBA
from tests.distill.random_students import saved, student_of

EXACT = Form("float32")
M = {"mixer": "mamba2"}
DELTA = {"M": {"mixer": "gated_deltanet"}}
LITE = {"mixer": "parallel_heads", "norm": False, "ssm": M}
SMALL_EPS = {"rms_norm_eps": 1e-6}
STUDENTS = {  # family, pattern, mixers, entries of the teacher's config; architecture, and what its entries say
    "llama, tied": (
        ("llama", "AMMM", {"M": M}, {"tie_word_embeddings": True}),
        ("granitehybrid", {"attention.head_count_kv": [2, 0, 0, 0], "ssm.group_count": 4, "ssm.state_size": 128}),
    ),
    "llama, expand 1, filled up": (
        ("llama", "MMAM", {"M": M | {"expand": 1}}, {}),
        ("granitehybrid", {"attention.head_count_kv": [0, 0, 2, 0], "ssm.group_count": 8, "ssm.time_step_rank": 8}),
    ),
    "llama, expand 1 in one group": (
        ("llama", "AM", {"M": M | {"expand": 1, "n_groups": 1}}, {"num_hidden_layers": 2}),
        ("granitehybrid", {"ssm.group_count": 2, "ssm.inner_size": 64, "rope.scaling.finetuned": True}),
    ),
    "llama, a wide state and three taps": (
        ("llama", "AM", {"M": M | {"d_state": 200, "d_conv": 3, "n_groups": 2}}, {"num_hidden_layers": 2}),
        ("granitehybrid", {"ssm.state_size": 256, "ssm.group_count": 2}),
    ),
    "llama 3's rope": (
        ("llama", "AMMM", {"M": M}, {"rope_parameters": LLAMA3}),
        ("granitehybrid", {"rope.dimension_count": 8, "rope.freq_base": 10000.0}),
    ),
    "yarn": (
        ("llama", "AMMM", {"M": M}, {"rope_parameters": YARN}),
        ("granitehybrid", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}),
    ),
    "no rope": (
        ("llama", "WM", {"M": M, "W": {"mixer": "attention", "rope": False}}, {"num_hidden_layers": 2}),
        ("granitehybrid", {"rope.scaling.finetuned": False}),
    ),
    "qwen2": (("qwen2", "AMMM", {"M": M}, {"tie_word_embeddings": True}), ("granitehybrid", {})),
    "granite": (
        ("granite", "AMMM", {"M": M}, GRANITE),
        ("granitehybrid", {"embedding_scale": 3.0, "residual_scale": 0.7, "attention.scale": 0.21, "logit_scale": 1.7}),
    ),
    "zamba": (("llama", "MSMS", ZAMBA, {}), ("granitehybrid", {"attention.head_count_kv": [0, 2, 0, 2]})),
    "mixtral": (
        ("mixtral", "AM", {"M": M}, {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}),
        ("granitehybrid", {"expert_count": 4, "expert_used_count": 2}),
    ),
    "qwen3": (
        ("qwen3", "MMMA", DELTA, SMALL_EPS | {"head_dim": 16}),
        ("qwen35", {"attention.recurrent_layers": [True] * 3 + [False], "full_attention_interval": 4}),
    ),
    "qwen3, attention first, tied": (
        ("qwen3", "AMMM", DELTA, SMALL_EPS | {"head_dim": 16, "tie_word_embeddings": True}),
        ("qwen35", {"attention.recurrent_layers": [False] + [True] * 3, "rope.dimension_sections": [3, 3, 2, 0]}),
    ),
    "hymba-lite": (
        ("llama", "P", {"P": LITE}, {"num_hidden_layers": 2}),
        ("falcon-h1", {"ssm.state_size": 128, "ssm.group_count": 4, "attention.head_count_kv": 2}),
    ),
}


def exported(place, tokenizer, family, pattern, mixers, entries, form=EXACT):
    """The folder of a random student, and the file made of it."""
    folder = saved(student_of(family, pattern, mixers, **entries), place / "a run" / "student", tokenizer)
    target("gguf").write(folder, place / "gguf", form)
    (path,) = (place / "gguf").iterdir()
    return folder, path
