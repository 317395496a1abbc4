"""Tiny GGUF files as llama.cpp's converter writes them, from random transformers models, and those models with the weights
that the files give back. Names and entries are spelled out here, so that a mistake in the reader cannot hide in both."""

from dataclasses import dataclass, field

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

VOCABULARY = 300
# block: bytes of a block of 256 values; halves: where its half-precision scales are
READ_ONLY = {"Q4_K": (144, (0, 2)), "Q6_K": (210, (208,))}
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", *READ_ONLY]

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
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
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


def random_model(case, seed=5):
    """A random model of a case, in which no weight has a value that a forgotten one would also have."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(case.model_type, **_copied(case.config))
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0.3 if "norm" in name else 0, 0.2 if "norm" in name or "bias" in name else 0.08)
    return model


def write(case, model, path, kind="F32", leave_out=(), add=None, entries=None, pre=None, flags=None):
    """Write the file; put into `model` the weights that it gives back, as gguf-py dequantises them.

    Args:
        leave_out: tensors not to write. add: further tensors. entries: further entries, without the architecture.
        pre: the vocabulary's name (default: Qwen's of its models, else GPT-2's).
        flags: further entries by their whole names.
    """
    writer = gguf.GGUFWriter(path, case.architecture)
    _write_entries(writer, case, model.config, entries or {})
    _write_tokenizer(writer, case, pre or ("qwen2" if case.architecture.startswith("qwen") else "gpt-2"))
    add_flags(writer, flags or {})
    for name, parameter in _tensors(case, model):
        if name in leave_out:
            continue
        data, quantised, back = _quantised(_as_stored(case, name, parameter.data, model.config), name, kind)
        writer.add_tensor(name, data, raw_dtype=quantised)
        parameter.data = _as_loaded(case, name, back, model.config)
    model.tie_weights()
    extra = {name: np.asarray(values, np.float32) for name, values in case.tensors.items()} | (add or {})
    if case.config["rope_parameters"].get("rope_type") == "llama3":
        extra["rope_freqs.weight"] = divisors(model.config)
    for name, values in extra.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_flags(writer, flags):
    """Write entries by their whole names."""
    add = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, list: writer.add_array}
    for name, value in flags.items():
        add[type(value)](name, value)


def divisors(config):
    """What llama.cpp stores for llama3 scaling: plain over scaled rotary frequencies."""
    width = config.head_dim
    base = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    return (base / ROPE_INIT_FUNCTIONS["llama3"](config)[0]).float().numpy()


def _copied(config):
    return {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}


def _write_entries(writer, case, config, entries):
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if "attention.head_count_kv" not in entries:
        writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = case.config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    for name, value in (case.entries | entries).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](f"{case.architecture}.{name}", value)


def _write_tokenizer(writer, case, pre):
    """A vocabulary of bytes with two merges, in the style that the architecture's models have; no merge leads to `the`."""
    if case.architecture in ("phi3", "gemma2", "gemma3"):
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab"]
        tokens += [f"<t{i}>" for i in range(len(tokens), VOCABULARY)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_pad_token_id(0)
        writer.add_token_scores([-float(i) for i in range(VOCABULARY)])
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (VOCABULARY - 259)])
    else:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        tokens = ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "ab", "ba", "the"]
        tokens += [f"<t{i}>" for i in range(len(tokens), VOCABULARY)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_types([3, 3, 3, *[1] * (VOCABULARY - 3)])
        writer.add_token_merges(["a b", "b a"])
    writer.add_token_list(tokens)
    if case.architecture != "llama":  # as Llama 3's vocabulary, which has none
        writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(case, model):
    """Names in the file and parameters of the model."""
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    if not model.config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight
    names = GEMMA_NAMES if case.architecture.startswith("gemma") else NAMES
    for layer, block in enumerate(model.model.layers):
        for name, parameter in block.named_parameters():
            module, _, suffix = name.rpartition(".")
            yield f"blk.{layer}.{names[module]}.{suffix}", parameter


def _order(case, name, config):
    """Which row of transformers' q or k stands in each row of the file; None where they are the same."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if case.architecture != "llama" or heads is None:
        return None
    width = config.head_dim
    within = [(row % 2) * (width // 2) + row // 2 for row in range(width)]
    return torch.tensor([head * width + row for head in range(heads) for row in within])


def _as_stored(case, name, tensor, config):
    order = _order(case, name, config)
    tensor = tensor + 1 if case.architecture.startswith("gemma") and "norm" in name else tensor
    return (tensor if order is None else tensor[order]).float().numpy()


def _as_loaded(case, name, values, config):
    tensor, order = torch.from_numpy(values.copy()), _order(case, name, config)
    if order is not None:
        tensor = torch.zeros_like(tensor).index_copy(0, order, tensor)
    return tensor - 1 if case.architecture.startswith("gemma") and "norm" in name else tensor


def _quantised(values, name, kind):
    """Data, type, and what gguf-py makes of it. Vectors stay in float32, as in every file."""
    kind = "F32" if values.ndim == 1 else kind
    quantised = GGMLQuantizationType[kind]
    data = _random_blocks(values.shape, *READ_ONLY[kind]) if kind in READ_ONLY else gguf.quantize(values, quantised)
    return np.ascontiguousarray(data), quantised, gguf.dequantize(data, quantised).astype(np.float32)


def _random_blocks(shape, size, halves):
    """Valid blocks of a type that gguf-py only reads: any bytes, but scales that are finite and small."""
    generator = np.random.default_rng(int(torch.randint(2**31, ()).item()))
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // 256, size), dtype=np.uint8)
    for start in halves:
        scales = generator.uniform(2e-5, 2e-4, blocks.shape[:-1]).astype(np.float16)
        blocks[..., start : start + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)
