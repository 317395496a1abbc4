"""Models for tiny GGUF files: transformers' config and the entries of each file, spelled out."""

from dataclasses import dataclass, field

VOCABULARY = 300
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-4,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 20_000.0, "factor": 4.0, "original_max_position_embeddings": 256}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + i / 24 for i in range(24)],
    "long_factor": [1.0 + i / 6 for i in range(24)],
    "original_max_position_embeddings": 32,
    "attention_factor": 1.2,
}


def plain(theta):
    """Rotary parameters without scaling."""
    return {"rope_type": "default", "rope_theta": theta}


@dataclass(frozen=True)
class Case:
    """One model: gguf's architecture, transformers' type, config beyond SIZES, entries of the file beyond the usual ones."""

    architecture: str
    model_type: str
    config: dict
    entries: dict = field(default_factory=dict)
    tensors: dict = field(default_factory=dict)


def _gemma(version, rope, entries, **config):
    usual = {"attention.sliding_window": 16, "attention.key_length": 64, "attention.value_length": 64}
    scale = {"sliding_window": 16, "query_pre_attn_scalar": 64, "rope_parameters": rope, "tie_word_embeddings": True}
    kind = "gemma3_text" if version == 3 else "gemma2"
    return Case(f"gemma{version}", kind, SIZES | scale | {"num_hidden_layers": 3 * version - 2} | config, usual | entries)


def _qwen3(rope=None, **config):
    width = config.get("head_dim", 64)
    entries = {"attention.key_length": width, "attention.value_length": width}
    if rope:
        entries |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 256}
    return Case("qwen3", "qwen3", SIZES | {"rope_parameters": rope or plain(1e6)} | config, entries)


WIDE = {"rope.dimension_count": 64}
CASES = {
    "llama": Case("llama", "llama", SIZES | {"rope_parameters": plain(1e5)}, WIDE),
    "llama-tied": Case("llama", "llama", SIZES | {"rope_parameters": plain(1e5), "tie_word_embeddings": True}, WIDE),
    "llama-biases": Case("llama", "llama", SIZES | {"rope_parameters": plain(1e5), "attention_bias": True}, WIDE),
    "llama-wide-heads": Case(
        "llama", "llama", SIZES | {"rope_parameters": plain(1e5), "head_dim": 128}, {"rope.dimension_count": 128}
    ),
    "llama-3.2": Case("llama", "llama", SIZES | {"rope_parameters": LLAMA3, "max_position_embeddings": 65536}, WIDE),
    "llama-3.1": Case("llama", "llama", SIZES | {"rope_parameters": LLAMA3 | {"factor": 8.0}}, WIDE),
    "llama-linear": Case(
        "llama", "llama", SIZES | {"rope_parameters": LINEAR}, {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    ),
    "mistral": Case(
        "llama",
        "mistral",
        SIZES | {"rope_parameters": plain(1e4), "sliding_window": 16},
        WIDE | {"attention.sliding_window": 16},
    ),
    "qwen2": Case("qwen2", "qwen2", SIZES | {"rope_parameters": plain(1e6)}),
    "qwen2-tied": Case("qwen2", "qwen2", SIZES | {"rope_parameters": plain(1e6), "tie_word_embeddings": True}),
    "qwen3": _qwen3(),
    "qwen3-tied-narrow-heads": _qwen3(tie_word_embeddings=True, head_dim=64, num_attention_heads=8),
    "qwen3-yarn": _qwen3(YARN, head_dim=128),
    "phi3": Case(
        "phi3",
        "phi3",
        SIZES | {"rope_parameters": plain(1e4), "original_max_position_embeddings": 1024, "sliding_window": 16},
        WIDE | {"rope.scaling.original_context_length": 1024, "attention.sliding_window": 16},
    ),
    "phi3-longrope": Case(
        "phi3",
        "phi3",
        SIZES | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
        {
            "rope.dimension_count": 48,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.attn_factor": 1.2,
            "attention.sliding_window": 0,
        },
        {f"rope_factors_{name}.weight": LONGROPE[f"{name}_factor"] for name in ("long", "short")},
    ),
    "gemma2": _gemma(
        2,
        plain(1e4),
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": _gemma(3, {"full_attention": plain(1e6), "sliding_attention": plain(1e4)}, {}),
    "gemma3-linear": _gemma(
        3,
        {"full_attention": LINEAR, "sliding_attention": plain(1e4)},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
}
