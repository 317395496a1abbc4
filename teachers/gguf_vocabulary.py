"""Splitting of text before the merges for byte-level vocabularies of GGUF files: one row per name in `tokenizer.ggml.pre`.

The regular expressions are those of the models' own tokenizers. llama.cpp approximates two of them (tekken, gpt-4o), since
its engine has no classes of upper and lower case letters. `make test-tokenizers` compares every row with llama.cpp.
"""

from dataclasses import dataclass
from difflib import get_close_matches

from tokenizers import Regex, pre_tokenizers

from teachers.gguf_facts import Facts

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
QWEN2 = _WORDS + r"\p{N}" + _REST
SEED = _WORDS + r"\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_SMALL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"  # a word that ends in lower case
_LARGE = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"  # a word that may be all upper case
_PATHS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{_SMALL}|{_LARGE}|\p{{N}}{_PATHS}"
GPT4O = rf"{_SMALL}{_CONTRACTIONS}?|{_LARGE}{_CONTRACTIONS}?|\p{{N}}{{1,3}}{_PATHS}"


@dataclass(frozen=True)
class Vocabulary:
    """The rules of a byte-level vocabulary, which llama.cpp selects by its name.

    Attributes:
        splits: regular expressions, applied one after the other to the pieces so far. Text between matches is a piece, too.
        whole_words: a piece that is a vocabulary entry is one token whatever the merges say, and the beginning-of-text token
            is added unless the file says otherwise.
        composed: text is first converted to Unicode's composed form (NFC). llama.cpp does not do this.
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    composed: bool = False


_DIGITS = Vocabulary((r"\p{N}", GPT2))
_GPT2 = Vocabulary((GPT2,))
_LLAMA3 = Vocabulary((LLAMA3,), whole_words=True)
_QWEN2 = Vocabulary((QWEN2,))
_GPT4O = Vocabulary((GPT4O,))
VOCABULARIES = {
    "default": Vocabulary((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "qwen2": Vocabulary((QWEN2,), composed=True),
    "seed-coder": Vocabulary((SEED,)),
    "tekken": Vocabulary((TEKKEN,), whole_words=True),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion"), _GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Vocabulary((LLAMA3,))),
    **dict.fromkeys(("deepseek-r1-qwen", "f2llmv2", "kormo", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O),
}


def vocabulary_of(facts: Facts) -> Vocabulary | None:
    """Returns the row of a file's vocabulary; None if it is a SentencePiece vocabulary, which has no name.

    Raises:
        ValueError: the vocabulary is of another kind, or there is no row of its name.
    """
    kind = facts.general("tokenizer.ggml.model")
    if kind == "llama":
        return None
    if kind != "gpt2":
        raise ValueError(
            f"{facts.path}: tokenizer.ggml.model is {kind!r}; only 'gpt2' (byte-level) and 'llama' (SentencePiece) are "
            "read: load the original checkpoint instead"
        )
    name = facts.general("tokenizer.ggml.pre") or "default"  # as in llama.cpp
    if name not in VOCABULARIES:
        close = get_close_matches(name, VOCABULARIES, n=1, cutoff=0.6)
        raise ValueError(
            f"{facts.path}: tokenizer.ggml.pre is {name!r}, and how that splits text is not known here"
            f"{f'; did you mean {close[0]!r}?' if close else ';'} known are {', '.join(sorted(VOCABULARIES))}: load the "
            "original checkpoint instead"
        )
    return VOCABULARIES[name]


def splitter(vocabulary: Vocabulary) -> pre_tokenizers.PreTokenizer:
    """Returns the pre-tokenizer that splits text into pieces, to be merged separately, and spells out their bytes."""
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in vocabulary.splits]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
