"""What tells one teacher from another: a hash of its weights, one of its config and one of its tokenizer, in one word.

They stand behind one another, "WEIGHTS-CONFIG-TOKENIZER-ROUNDED", so that two that differ say in what. ROUNDED is the hash
of the weights as bfloat16 holds them: a teacher has the same one in whichever type it is held. WEIGHTS is of the numbers as
they are, and "rounded" where the checkpoint has more digits than the type that holds it. Words of earlier versions have the
first of these alone, or the first three.
"""

import hashlib
import json

from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

PARTS = ("weights", "config", "tokenizer")
SAMPLE = 1024  # values of a tensor, entries of a vocabulary
DIGITS = 16, 8, 8, 16
UNKNOWN = "rounded"  # in the place of a hash of weights
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


def fingerprint(
    model: nn.Module, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None, rounded: bool = False
) -> str:
    """The word of a teacher: of sizes and sampled values of every weight, of every entry of its config that is not the usual
    one, and of its vocabulary, special tokens and how it cuts some texts. It tells teachers apart, and proves nothing.

    Args:
        rounded: whether the type that the weights are held in has fewer digits than their checkpoint.
    """
    exact, narrow = _of_weights(model, config)
    found = (UNKNOWN if rounded else exact, _of_config(config), _of_tokenizer(tokenizer), narrow)
    return "-".join(digest[:digits] for digest, digits in zip(found, DIGITS, strict=True))


def difference(known: str, now: str) -> str | None:
    """In what two teachers differ by their words, "weights", "config" or "tokenizer"; None where they are the same, as far
    as both words tell."""
    one, other = known.split("-"), now.split("-")
    for part, mine, theirs in zip(PARTS, one, other, strict=False):
        if part == "weights" and UNKNOWN in (mine, theirs):
            mine, theirs = (one[3], other[3]) if len(one) == len(other) == len(DIGITS) else ("", "")
        if mine != theirs:
            return part
    return None


def tokenizer_part(word: str) -> str:
    """The hash of a teacher's tokenizer in its word; empty where the word has none."""
    found = dict(zip(PARTS, word.split("-"), strict=False))
    return found.get("tokenizer", "")


def _of_weights(model: nn.Module, config: PretrainedConfig) -> tuple[str, str]:
    """Of the numbers as they are held, and as bfloat16 would hold them."""
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
