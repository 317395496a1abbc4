"""GGUF files, written by gguf-py and read back: rotary frequencies put back or refused, damaged files named."""

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import teachers
from teachers.gguf import converted, rope_factors

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))


def llama(scaling):
    torch.manual_seed(5)
    rope = {"rope_type": "default", "rope_theta": 500000.0} | (scaling or {})
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=65536,
        rope_parameters=rope,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def permuted(weight, heads):
    """The row order that llama.cpp keeps q and k in."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(model, path, factors=None):
    """A GGUF file of a tiny Llama as llama.cpp's converter would write it, in float32, with a byte-level tokenizer."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = [bytes([i]).decode("latin-1") if 33 <= i < 127 else f"<t{i}>" for i in range(config.vocab_size)]
    tokens[-1], tokens[0] = "ab", "<|endoftext|>"
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    tensors = {"token_embd.weight": model.model.embed_tokens.weight, "output_norm.weight": model.model.norm.weight}
    tensors["output.weight"] = model.lm_head.weight
    for name, tensor in model.model.layers.named_parameters():
        layer, _, rest = name.partition(".")
        if "q_proj" in rest or "k_proj" in rest:
            heads = config.num_attention_heads if "q_proj" in rest else config.num_key_value_heads
            tensor = permuted(tensor, heads)
        tensors[f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"] = tensor
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.detach().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def divisors(config):
    """What llama.cpp stores: plain over scaled rotary frequencies."""
    width = config.head_dim
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    return (plain / ROPE_INIT_FUNCTIONS["llama3"](config)[0]).float().numpy()


@pytest.mark.parametrize("scaling", [None, LLAMA3, LLAMA3 | {"factor": 8.0}], ids=["plain", "llama-3.2", "llama-3.1"])
def test_a_llama_comes_back_as_it_was(tmp_path, scaling):
    model = llama(scaling)
    path = write(model, tmp_path / "tiny.gguf", None if scaling is None else divisors(model.config))
    teacher = teachers.load(str(path))
    ids = torch.randint(0, 260, (1, 300))
    assert torch.allclose(teacher.model(ids).logits, model(ids).logits, atol=1e-4)
    assert teacher.config.rope_parameters["rope_type"] == ("llama3" if scaling else "default")
    folder = converted(path)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert converted(path) == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_unknown_rotary_frequencies_are_refused(tmp_path):
    model = llama(None)
    path = write(model, tmp_path / "odd.gguf", np.linspace(1, 3, 8, dtype=np.float32))
    with pytest.raises(ValueError, match="no llama3 scaling gives"):
        teachers.load(str(path))
    assert not list((tmp_path / "cache" / "teachers").iterdir())


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"GGUF\x03\x00\x00\x00"])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.gguf is not a readable GGUF file"):
        teachers.load(str(path))


def test_a_truncated_file_is_named(tmp_path):
    path = write(llama(None), tmp_path / "whole.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(ValueError, match=r"cut\.gguf"):
        teachers.load(str(cut))


def test_the_real_teacher_has_plain_rope():
    from pathlib import Path

    from teachers.source import resolve
    from tests.conftest import SMOLLM2

    assert rope_factors(Path(resolve(SMOLLM2).location)) is None
