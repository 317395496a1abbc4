"""The valid types and ranges of the entries of config.json, for all families.

Values outside them make a library build a model of endless size, or one that computes NaN.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

LAYERS, HEADS, WIDTH, TOKENS, POSITIONS, EXPERTS = 1024, 2**16, 2**20, 2**24, 2**31, 2**12  # largest valid values

Rule = Callable[[Any], str | None]


def whole(low: int, high: int) -> Rule:
    """Returns the rule of a whole number in a range, both ends included.

    A rule returns None for a valid value, otherwise what the value should be.
    """

    def wrong(value: Any) -> str | None:
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if fits else f"a whole number from {low:,} to {high:,}"

    return wrong


def real(low: float, high: float) -> Rule:
    """Returns the rule of a number in a range, both ends included."""

    def wrong(value: Any) -> str | None:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return None if fits else f"a number from {low:g} to {high:g}"

    return wrong


def kind(words: str, *types: type) -> Rule:
    """Returns the rule of a value of one of some types; `words` names the types in messages."""
    return lambda value: None if isinstance(value, types) else words


def listed(rule: Rule, single: bool = False) -> Rule:
    """Returns the rule of a list whose entries all follow `rule`. single: one value outside a list is valid, too."""

    def wrong(value: Any) -> str | None:
        if not isinstance(value, list | tuple):
            return rule(value) if single else "a list"
        found = next(filter(None, map(rule, value)), None)
        return found and f"a list, each entry {found}"

    return wrong


_SMALLEST, _LARGEST = 1e-12, 1e12
_POSITIVE, _ANY = real(_SMALLEST, _LARGEST), real(-_LARGEST, _LARGEST)
_SHARE, _EPS = real(0, 1), real(0, 1)
_TRUTH, _TEXT = kind("true or false", bool), kind("text", str)
_TOKEN = listed(whole(-1, TOKENS), single=True)

BOUNDS: dict[str, Rule] = {
    "model_type": _TEXT,
    **dict.fromkeys(("num_hidden_layers", "n_layer"), whole(1, LAYERS)),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads"), whole(1, HEADS)),
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner", "ffn_hidden_size"), whole(1, WIDTH)),
    **dict.fromkeys(("head_dim", "moe_intermediate_size"), whole(1, WIDTH)),
    "vocab_size": whole(1, TOKENS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "sliding_window"), whole(1, POSITIONS)),
    "original_max_position_embeddings": whole(1, POSITIONS),
    **dict.fromkeys(("num_local_experts", "num_experts", "num_experts_per_tok"), whole(0, EXPERTS)),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), _EPS),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "rope_local_base_freq", "query_pre_attn_scalar"), _POSITIVE),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), _POSITIVE),
    **dict.fromkeys(("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"), _ANY),
    "logit_scale": _ANY,
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), real(_SMALLEST, 1)),
    "initializer_range": real(0, 1e3),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"), _SHARE),
    **dict.fromkeys(("tie_word_embeddings", "use_cache", "attention_bias", "mlp_bias", "use_sliding_window"), _TRUTH),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _TOKEN),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function", "dtype", "torch_dtype"), _TEXT),
    **dict.fromkeys(("layer_types", "architectures"), listed(_TEXT)),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "quantization_config", "distill"), kind("a mapping", dict)),
}
ROPE: dict[str, Rule] = {
    **dict.fromkeys(("rope_type", "type"), _TEXT),
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), _POSITIVE),
    "partial_rotary_factor": real(_SMALLEST, 1),
    "original_max_position_embeddings": whole(1, POSITIONS),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), real(0, _LARGEST)),
    **dict.fromkeys(("long_factor", "short_factor"), listed(_POSITIVE)),
}
_SETTING, _COUNT = real(-1e6, 1e6), whole(-1, POSITIONS)
GENERATION: dict[str, Rule] = {  # of generation_config.json
    **dict.fromkeys(
        ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id"), _TOKEN
    ),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), listed(whole(-1, TOKENS))),
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"), _SETTING),
    **dict.fromkeys(("repetition_penalty", "length_penalty", "penalty_alpha", "diversity_penalty", "max_time"), _SETTING),
    **dict.fromkeys(
        ("top_k", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size"), _COUNT
    ),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "prefill_chunk_size"), whole(1, 2**20)),
    **dict.fromkeys(("do_sample", "use_cache", "output_scores", "output_logits", "return_dict_in_generate"), _TRUTH),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "renormalize_logits", "remove_invalid_values"), _TRUTH),
    "stop_strings": listed(_TEXT, single=True),
    "cache_implementation": _TEXT,
}
# Entries that would fetch a kernel from the hub and run it.
CHOOSE_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
KNOWN_CODE = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "grouped_mm", "batched_mm")


def check_config(entries: Mapping[str, Any], file: str) -> None:
    """Refuse the first entry with a wrong type or a value out of its range. Unknown entries and null are not checked.

    Raises:
        ValueError: naming entry, value and range.
    """
    _check(entries, BOUNDS, file)
    for name in ("rope_parameters", "rope_scaling"):
        _check_rope(entries.get(name) or {}, f"{file}: {name}")
    for name in CHOOSE_CODE:
        if entries.get(name) not in KNOWN_CODE:
            raise ValueError(
                f"{file}: {name} is {shown(entries[name])}, which transformers would fetch from elsewhere and run; take the "
                f"entry out, or choose one of {', '.join(map(str, KNOWN_CODE[1:]))}"
            )
    layers, types = entries.get("num_hidden_layers"), entries.get("layer_types")
    if layers is not None and types is not None and len(types) != layers:
        raise ValueError(f"{file}: layer_types has {len(types)} entries for {layers} layers (num_hidden_layers)")
    _check_heads(entries, file)


def check_generation(entries: Mapping[str, Any], file: str) -> None:
    """Refuse a setting of generation_config.json with a wrong type or a value out of its range.

    Raises:
        ValueError: naming setting, value and range.
    """
    _check(entries, GENERATION, file)


def _check_rope(entries: Mapping[str, Any], where: str) -> None:
    _check(entries, ROPE, where)
    for name, inner in entries.items():  # the entries of one kind of layer
        if isinstance(inner, dict):
            _check(inner, ROPE, f"{where}: {name}")


def _check_heads(entries: Mapping[str, Any], file: str) -> None:
    heads = next((entries[name] for name in ("num_attention_heads", "n_head") if entries.get(name)), None)
    keys = entries.get("num_key_value_heads")
    if heads and keys and heads % keys:
        raise ValueError(f"{file}: num_key_value_heads is {keys}, which does not divide the {heads} attention heads")


def _check(entries: Mapping[str, Any], rules: Mapping[str, Rule], where: str) -> None:
    for name, rule in rules.items():
        value = entries.get(name)
        if value is not None and (wanted := rule(value)) is not None:
            raise ValueError(f"{where}: {name} is {shown(value)}; it should be {wanted}")


def shown(value: Any) -> str:
    """Returns a value as text for a message, shortened to 60 characters."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
