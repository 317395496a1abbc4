"""Fingerprints of teachers: hashes of weights, config and tokenizer, joined to "WEIGHTS-CONFIG-TOKENIZER-ROUNDED".

The parts show in what two teachers differ. WEIGHTS is the hash of the weights as they are in memory, or the word "rounded"
if the checkpoint has more digits than the type in memory. ROUNDED is the hash of the weights rounded to bfloat16: it is the
same whatever type the weights are loaded in. Fingerprints of earlier versions have only the first part, or the first three.
"""

import hashlib
import json

from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

PARTS = ("weights", "config", "tokenizer")
SAMPLE = 1024  # sampled values of a tensor, and entries of a vocabulary
DIGITS = 16, 8, 8, 16
UNKNOWN = "rounded"  # stands in place of the hash of the weights
# Config entries that do not change what a model computes: its origin, the software that saved it, how it is run.
ELSEWHERE = (
    *("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache"),
    *("_attn_implementation", "_attn_implementation_internal", "quantization_config", "output_attentions"),
    *("output_hidden_states", "return_dict", "task_specific_params", "pretraining_tp", "id2label", "label2id"),
)
# Texts that tokenizers split differently: spaces, lines, digits, case, accents in both forms, scripts, symbols, code.
PROBES = (
    "The quick brown fox  jumps\n\n over\tthe lazy dog.   ",
    "It's 1234567 o'clock: 3.14, 2e-5, $10 and 50%; WHAT? don't-stop\r\n",
    "naïve café, nai\u0308ve cafe\u0301, Straße, \ufb01ne, ｆｕｌｌ",  # noqa: RUF001, wide letters on purpose
    "Привет, мир! 你好，世界。 こんにちは مرحبا שלום नमस्ते 👍🏽",  # noqa: RUF001
    "def f(x):\n    return {'a': [x**2, x // 3]}  # <s> </s> <|endoftext|> [INST]\n",
)


def fingerprint(
    model: nn.Module, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None, rounded: bool = False
) -> str:
    """Returns a teacher's fingerprint.

    It covers the shape and sampled values of every weight, every config entry that differs from its default, the vocabulary,
    the special tokens, and the tokens of some texts. Equal fingerprints are no proof of equal teachers.

    Args:
        rounded: whether the type of the weights in memory has fewer digits than their checkpoint.
    """
    exact, narrow = _of_weights(model, config)
    found = (UNKNOWN if rounded else exact, _of_config(config), _of_tokenizer(tokenizer), narrow)
    return "-".join(digest[:digits] for digest, digits in zip(found, DIGITS, strict=True))


def difference(known: str, now: str) -> str | None:
    """Returns the first part in which two fingerprints differ: "weights", "config" or "tokenizer".

    None if all parts that both fingerprints have are equal.
    """
    one, other = known.split("-"), now.split("-")
    for part, mine, theirs in zip(PARTS, one, other, strict=False):
        if part == "weights" and UNKNOWN in (mine, theirs):
            mine, theirs = (one[3], other[3]) if len(one) == len(other) == len(DIGITS) else ("", "")
        if mine != theirs:
            return part
    return None


def tokenizer_part(word: str) -> str:
    """Returns the tokenizer's hash from a fingerprint; "" if the fingerprint has none."""
    found = dict(zip(PARTS, word.split("-"), strict=False))
    return found.get("tokenizer", "")


def _of_weights(model: nn.Module, config: PretrainedConfig) -> tuple[str, str]:
    """Returns two hashes: of the weights as they are in memory, and of the weights rounded to bfloat16."""
    exact = hashlib.sha256(config.model_type.encode())
    narrow = exact.copy()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLE)].float().cpu().contiguous()
        for digest, values in ((exact, sample), (narrow, sample.bfloat16().float())):
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return exact.hexdigest(), narrow.hexdigest()


def _of_config(config: PretrainedConfig) -> str:
    entries = {name: value for name, value in config.to_diff_dict().items() if name not in ELSEWHERE and value is not None}
    if "partial_rotary_factor" in (entries.get("rope_parameters") or {}):  # 5.17 stores it twice, 5.24 once
        entries.pop("partial_rotary_factor", None)
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        return "0" * max(DIGITS)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    some = tokenizer.convert_tokens_to_string([token for token, _ in vocabulary[:: max(1, len(vocabulary) // SAMPLE)]])
    facts = [vocabulary, special, [tokenizer(text)["input_ids"] for text in (*PROBES, some)]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
