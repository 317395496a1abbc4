"""Tiny GGUF files as llama.cpp's converter writes them, from random transformers models, and those models with the weights
that the files give back. Names and entries are spelled out here, so that a mistake in the reader cannot hide in both."""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.teachers.gguf_cases import VOCABULARY

# block: bytes of a block of 256 values; halves: where its half-precision scales are
READ_ONLY = {"Q4_K": (144, (0, 2)), "Q6_K": (210, (208,))}
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", *READ_ONLY]
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
