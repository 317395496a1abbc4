"""Conversion of a GGUF file's entries to a transformers config: one row per architecture.

transformers' own reader silently drops entries (head width, soft-caps, scaled rotary embeddings, attention scales), so that
the same weights become a different model. Here every entry of the model is read or known not to matter; otherwise the file
is refused. Values that llama.cpp has in its code and not in the file are set in the row's function.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from teachers.compat import rotary_frequencies
from teachers.config_bounds import EXPERTS, HEADS, LAYERS, POSITIONS, WIDTH, kind, listed, real, shown, whole
from teachers.gguf_facts import Facts

ORIGINAL_LENGTHS = (8192, 4096, 2048, 16384, 32768)  # tried for llama3 scaling; the file does not state the length
_TEXT, _WINDOW = kind("text", str), whole(0, POSITIONS)
_FACTOR, _BASE, _SIZE, _LENGTH = real(0, 1e6), real(1e-3, 1e12), whole(1, WIDTH), whole(1, POSITIONS)
_CAP = real(1e-3, 1e6)


@dataclass(frozen=True)
class Architecture:
    """The form in which llama.cpp writes one architecture.

    Attributes:
        model_type: transformers' name of it. config: returns its config entries in addition to those of every architecture.
        interleaved: whether rows of q and k are stored in the order of llama.cpp's interleaved rotary embedding.
        norm_offset: number that was added to the weight of every norm.
    """

    model_type: str
    config: Callable[[Facts, dict], dict]
    interleaved: bool = False
    norm_offset: float = 0.0


TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # the tokenizer has them


def config_of(facts: Facts) -> tuple[Any, Architecture]:
    """Returns the transformers config of a file's model, and the row of its architecture.

    Raises:
        ValueError: the architecture has no row, or an entry is missing, contradicts the tensors or has no equivalent in the
            config.
    """
    from transformers import AutoConfig

    if facts.architecture not in ARCHITECTURES:
        raise ValueError(
            f"{facts.path} is a {shown(facts.architecture)} model; GGUF files are read of {', '.join(ARCHITECTURES)}: "
            "load the original checkpoint instead"
        )
    architecture = ARCHITECTURES[facts.architecture]
    entries = _usual(facts)
    entries |= architecture.config(facts, entries)
    if unread := facts.unread():
        values = ", ".join(f"{name} = {shown(facts.general(name))}" for name in unread)
        raise ValueError(f"{facts.path} says {values}, which cannot be honoured here; load the original checkpoint instead")
    kind = entries.pop("model_type", architecture.model_type)
    config = AutoConfig.for_model(kind, **dict.fromkeys(TOKENS), **entries)  # a family's own defaults may lie outside
    return config, architecture


def _usual(facts: Facts) -> dict:
    """Returns the config entries that every architecture has."""
    heads = facts.need("attention.head_count", whole(1, HEADS))
    stated = facts.get("attention.head_count_kv", single=True)
    key_heads = heads if stated is None else facts.need("attention.head_count_kv", whole(1, HEADS))
    if heads % key_heads:
        raise ValueError(
            f"{facts.path}: {facts.architecture}.attention.head_count_kv is {key_heads}, which does not divide the {heads} "
            "heads; download it again"
        )
    if facts.get("expert_count", rule=whole(0, EXPERTS)):
        raise ValueError(f"{facts.path} is a mixture of experts, which is not read from GGUF; load the original checkpoint")
    entries = {
        "vocab_size": facts.rows("token_embd.weight"),
        "hidden_size": facts.need("embedding_length", _SIZE),
        "intermediate_size": facts.need("feed_forward_length", _SIZE),
        "num_hidden_layers": facts.need("block_count", whole(1, LAYERS)),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": _head_dim(facts, heads, key_heads),
        "max_position_embeddings": facts.need("context_length", _LENGTH),
        "rms_norm_eps": facts.need("attention.layer_norm_rms_epsilon", real(0, 1)),
        "tie_word_embeddings": "output.weight" not in facts.tensors,
    }
    return entries


def _head_dim(facts: Facts, heads: int, key_heads: int) -> int:
    """Returns the channels per head, computed from the first layer's tensors and checked against the file's entries."""
    if "blk.0.attn_qkv.weight" in facts.tensors:
        rows, parts = facts.rows("blk.0.attn_qkv.weight"), heads + 2 * key_heads
    else:
        rows, parts = facts.rows("blk.0.attn_q.weight"), heads
    head_dim, over = divmod(rows, parts)
    if over or not head_dim:
        raise ValueError(
            f"{facts.path}: {facts.architecture}.attention.head_count is {heads}, but the first layer's queries have {rows} "
            f"rows, which cannot be divided among {heads} heads; download it again"
        )
    for name in ("attention.key_length", "attention.value_length"):
        if (width := facts.get(name, head_dim, _SIZE)) != head_dim:
            raise ValueError(
                f"{facts.path}: {facts.architecture}.{name} is {width}, but the queries have heads of {head_dim}"
            )
    return head_dim


def _rope(facts: Facts, head_dim: int) -> dict:
    """Returns rotary parameters for the whole head: plain, linear, yarn, or llama3 from the stored divisors."""
    if (rotated := facts.get("rope.dimension_count", head_dim, _SIZE)) != head_dim:
        raise ValueError(
            f"{facts.path}: {facts.architecture}.rope.dimension_count is {rotated}, but heads have {head_dim} channels; "
            "partial rotary embedding is not read for this architecture"
        )
    theta = {"rope_theta": float(facts.get("rope.freq_base", 10_000.0, _BASE))}
    scaling = facts.get("rope.scaling.type", "linear", _TEXT)  # as in llama.cpp: a factor without a type means linear
    factor = float(facts.get("rope.scaling.factor", 0.0, _FACTOR)) or 1.0
    original = facts.get("rope.scaling.original_context_length", facts.need("context_length", _LENGTH), _LENGTH)
    betas = {
        f"beta_{name}": float(facts.get(f"rope.scaling.yarn_beta_{name}", usual, _FACTOR))
        for name, usual in (("fast", 32), ("slow", 1))
    }
    divisors = facts.vector("rope_freqs.weight")
    divided = divisors is not None and not torch.allclose(divisors, torch.ones_like(divisors))
    plain = scaling == "none" or (scaling == "linear" and factor == 1.0)
    if scaling not in ("none", "linear", "yarn") or (divided and not plain):
        raise ValueError(
            f"{facts.path}: {facts.architecture}.rope.scaling.type {shown(scaling)}"
            f"{' beside rope_freqs.weight' if divided else ''} is not read here; load the original checkpoint instead"
        )
    if divisors is not None and divided:
        return llama3_rope(divisors, theta["rope_theta"], facts.path)
    if plain:
        return {"rope_type": "default", **theta}
    if scaling == "linear":
        return {"rope_type": "linear", "factor": factor, **theta}
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas, **theta}


def llama3_rope(divisors: torch.Tensor, theta: float, path: Path) -> dict:
    """Returns the llama3 rope parameters that give these divisors of the rotary frequencies.

    Raises:
        ValueError: none of the known parameters gives them, so the model would be loaded with wrong positions.
    """
    from transformers import LlamaConfig

    width = 2 * len(divisors)
    plain = theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    for length in ORIGINAL_LENGTHS:
        parameters = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": round(divisors.max().item(), 3),  # the file stores float32
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": length,
        }
        sizes: dict[str, Any] = {
            "hidden_size": width,
            "num_attention_heads": 1,
            "head_dim": width,
            "max_position_embeddings": 2 * length,
        }
        scaled = rotary_frequencies("llama3", LlamaConfig(rope_parameters=dict(parameters), **sizes))
        if torch.allclose(plain / scaled, divisors, rtol=1e-3):
            return parameters
    raise ValueError(
        f"{path} stores rotary frequencies (rope_freqs.weight) that no llama3 scaling gives; load the original "
        "checkpoint instead of its GGUF"
    )


def _llama(facts: Facts, entries: Mapping) -> dict:
    """Llama, and Mistral, which differs only in a window. Most files of Mistral do not state it."""
    window = facts.get("attention.sliding_window", rule=_WINDOW)
    found = {"rope_parameters": _rope(facts, entries["head_dim"])}
    if window:
        return found | {"model_type": "mistral", "sliding_window": window}
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_down.bias"}
    return found | {key: tensor in facts.tensors for key, tensor in biases.items()}


def _qwen(facts: Facts, entries: Mapping) -> dict:
    """Qwen 2, whose class always has biases, and Qwen 3, which normalises queries and keys instead."""
    return {"rope_parameters": _rope(facts, entries["head_dim"]), "use_sliding_window": False}


def _phi3(facts: Facts, entries: Mapping) -> dict:
    """Phi-3: rotary embedding on part of the head, with two sets of frequency divisors, for short and for long sequences."""
    dimensions = facts.get("rope.dimension_count", entries["head_dim"], _SIZE)
    original = facts.get("rope.scaling.original_context_length", entries["max_position_embeddings"], _LENGTH)
    rope = {
        "rope_type": "default",
        "rope_theta": float(facts.get("rope.freq_base", 10_000.0, _BASE)),
        "partial_rotary_factor": dimensions / entries["head_dim"],
    }
    if (scaling := facts.get("rope.scaling.type", "longrope", _TEXT)) not in ("longrope", "none"):
        raise ValueError(f"{facts.path}: phi3.rope.scaling.type {scaling!r} is not read here")
    long, short = facts.vector("rope_factors_long.weight"), facts.vector("rope_factors_short.weight")
    for divisors in (long, short):
        if divisors is not None and len(divisors) != dimensions // 2:
            raise ValueError(
                f"{facts.path} stores {len(divisors)} factors of rotary frequencies for {dimensions} rotated channels of a "
                "head; download it again"
            )
    attention_factor = facts.get("rope.scaling.attn_factor", rule=_FACTOR)
    if long is not None and short is not None:
        rope |= {
            "rope_type": "longrope",
            "long_factor": long.tolist(),
            "short_factor": short.tolist(),
            "original_max_position_embeddings": original,
        }
        rope |= {} if attention_factor is None else {"attention_factor": float(attention_factor)}
    window = facts.get("attention.sliding_window", rule=_WINDOW) or None  # 0 means no window
    return {"rope_parameters": rope, "original_max_position_embeddings": original, "sliding_window": window}


def _slides(value: Any) -> str | None:
    """The rule of a window pattern: a number n (every n-th layer has no window), or one boolean per layer."""
    return whole(1, LAYERS)(value) if isinstance(value, int) else listed(kind("true or false", bool))(value)


def _gemma(facts: Facts, entries: Mapping, version: int) -> dict:
    """Gemma 2 and 3. The layers with windows, their rotary base and the largest model's scale follow llama.cpp's code."""
    layers, head_dim = entries["num_hidden_layers"], entries["head_dim"]
    largest = layers == {2: 46, 3: 62}[version]  # the 27B models scale by hidden size / heads
    rope = _rope(facts, head_dim)
    window = facts.get("attention.sliding_window", 4096 if version == 2 else None, _WINDOW)
    pattern = facts.get("attention.sliding_window_pattern", {2: 2, 3: 6}[version], _slides, single=False)
    if isinstance(pattern, list) and len(pattern) != layers:
        raise ValueError(
            f"{facts.path}: {facts.architecture}.attention.sliding_window_pattern has {len(pattern)} entries for {layers} "
            "layers; download it again"
        )
    slides = pattern if isinstance(pattern, list) else [layer % pattern < pattern - 1 for layer in range(layers)]
    found = {
        "query_pre_attn_scalar": entries["hidden_size"] // entries["num_attention_heads"] if largest else head_dim,
        "sliding_window": window,
        "layer_types": ["sliding_attention" if window and slide else "full_attention" for slide in slides],
        "final_logit_softcapping": facts.get("final_logit_softcapping", 30.0 if version == 2 else None, _CAP),
    }
    local = facts.get("rope.freq_base_swa", 10_000.0 if version == 3 else rope["rope_theta"], _BASE)
    if version == 3:
        sliding = {"rope_type": "default", "rope_theta": float(local)}
        return found | {"rope_parameters": {"full_attention": rope, "sliding_attention": sliding}}
    if local != rope["rope_theta"]:
        raise ValueError(f"{facts.path}: gemma2.rope.freq_base_swa is {local}, but Gemma 2 has one rotary base")
    return found | {"rope_parameters": rope, "attn_logit_softcapping": facts.get("attn_logit_softcapping", 50.0, _CAP)}


ARCHITECTURES = {
    "llama": Architecture("llama", _llama, interleaved=True),
    "qwen2": Architecture("qwen2", _qwen),
    "qwen3": Architecture("qwen3", _qwen),
    "phi3": Architecture("phi3", _phi3),
    "gemma2": Architecture("gemma2", partial(_gemma, version=2), norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", partial(_gemma, version=3), norm_offset=1.0),
}
