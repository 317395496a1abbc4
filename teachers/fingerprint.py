"""What tells one teacher from another: a hash of its weights, one of its config and one of its tokenizer, in one word.

The three stand behind one another, "WEIGHTS-CONFIG-TOKENIZER", so that two that differ say in what. Words of only the first
are of earlier versions.
"""

import hashlib
import json

from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

PARTS = ("weights", "config", "tokenizer")
SAMPLE = 1024  # values of a tensor, entries of a vocabulary
DIGITS = 16, 8, 8
# Entries of a config that say where a model was, who wrote it down and how it is run, not what it computes.
ELSEWHERE = (
    *("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache"),
    *("_attn_implementation", "_attn_implementation_internal", "quantization_config", "output_attentions"),
    *("output_hidden_states", "return_dict", "task_specific_params", "pretraining_tp", "id2label", "label2id"),
)
# Texts on which tokenizers differ: spaces, lines, digits, cases, accents composed and not, other scripts, symbols, code.
PROBES = (
    "The quick brown fox  jumps\n\n over\tthe lazy dog.   ",
    "It's 1234567 o'clock: 3.14, 2e-5, $10 and 50%; WHAT? don't-stop\r\n",
    "naïve café, nai\u0308ve cafe\u0301, Straße, \ufb01ne, ｆｕｌｌ",  # noqa: RUF001, wide letters on purpose
    "Привет, мир! 你好，世界。 こんにちは مرحبا שלום नमस्ते 👍🏽",  # noqa: RUF001
    "def f(x):\n    return {'a': [x**2, x // 3]}  # <s> </s> <|endoftext|> [INST]\n",
)


def fingerprint(model: nn.Module, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The word of a teacher: of sizes and sampled values of every weight, of every entry of its config that is not the usual
    one, and of its vocabulary, special tokens and how it cuts some texts. It tells teachers apart, and proves nothing."""
    found = (_of_weights(model, config), _of_config(config), _of_tokenizer(tokenizer))
    return "-".join(digest[:digits] for digest, digits in zip(found, DIGITS, strict=True))


def difference(known: str, now: str) -> str | None:
    """In what two teachers differ by their words, "weights", "config" or "tokenizer"; None where they are the same."""
    for part, one, other in zip(PARTS, known.split("-"), now.split("-"), strict=False):
        if one != other:
            return part
    return None


def _of_weights(model: nn.Module, config: PretrainedConfig) -> str:
    digest = hashlib.sha256(config.model_type.encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLE)].float().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _of_config(config: PretrainedConfig) -> str:
    entries = {name: value for name, value in config.to_diff_dict().items() if name not in ELSEWHERE and value is not None}
    if "partial_rotary_factor" in (entries.get("rope_parameters") or {}):  # 5.17 says it twice, 5.24 does not
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
