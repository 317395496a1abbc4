"""How byte-level vocabularies of GGUF files cut text before the merges: one row of VOCABULARIES for what
`tokenizer.ggml.pre` names.

The expressions are those of the models' own tokenizers, which llama.cpp approximates where its engine has no classes of
cased letters (tekken, gpt-4o). `make test-tokenizers` holds every row against llama.cpp.
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
_SMALL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"  # a word that ends in small letters
_LARGE = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"  # one that may be capitals alone
_PATHS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{_SMALL}|{_LARGE}|\p{{N}}{_PATHS}"
GPT4O = rf"{_SMALL}{_CONTRACTIONS}?|{_LARGE}{_CONTRACTIONS}?|\p{{N}}{{1,3}}{_PATHS}"


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp knows of a byte-level vocabulary by its name.

    Attributes:
        splits: expressions, each of which cuts the pieces that those before it left; what lies between two matches is a
            piece too.
        whole_words: a piece that is an entry is one token whatever the merges say, and text begins with the token that
            begins it unless the file says otherwise.
        composed: text is brought into Unicode's composed form first. llama.cpp leaves that out.
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
    """The row of a file's vocabulary, None where it is a SentencePiece one, which has no name.

    Raises:
        ValueError: a vocabulary of another kind, or one that names a row that is not there.
    """
    kind = facts.general("tokenizer.ggml.model")
    if kind == "llama":
        return None
    if kind != "gpt2":
        raise ValueError(
            f"{facts.path}: tokenizer.ggml.model is {kind!r}; vocabularies are read of the kinds 'gpt2' (byte-level) and "
            "'llama' (SentencePiece): load the original checkpoint instead"
        )
    name = facts.general("tokenizer.ggml.pre") or "default"  # as llama.cpp
    if name not in VOCABULARIES:
        close = get_close_matches(name, VOCABULARIES, n=1, cutoff=0.6)
        raise ValueError(
            f"{facts.path}: tokenizer.ggml.pre is {name!r}, and how that splits text is not known here"
            f"{f'; did you mean {close[0]!r}?' if close else ';'} known are {', '.join(sorted(VOCABULARIES))}: load the "
            "original checkpoint instead"
        )
    return VOCABULARIES[name]


def splitter(vocabulary: Vocabulary) -> pre_tokenizers.PreTokenizer:
    """What cuts text into the pieces that are merged one by one, and spells their bytes."""
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in vocabulary.splits]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
