"""The tokenizer of a GGUF file, built only from the file's entries, with llama.cpp's meaning of each.

Every entry that begins with `tokenizer.` is honoured or listed in IGNORED with the reason; any other entry refuses the file.
`gguf_vocabulary` splits text for byte-level vocabularies. A SentencePiece vocabulary merges the pair whose entry has the
highest score. transformers' own reader uses a class for each architecture, whose rules override the file's.
`make test-tokenizers` compares the tokens with llama.cpp's on a set of texts.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerBase

from teachers.config_bounds import TOKENS, kind, listed, real, shown, whole
from teachers.gguf_facts import Facts
from teachers.gguf_vocabulary import splitter, vocabulary_of

GGML = "tokenizer.ggml."
SPECIAL = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
    "sep": "seperator",
    "mask": "mask",
}  # transformers' name: gguf's name, in gguf's spelling
UNSTATED = {"bos": 1, "eos": 2, "unk": 0}  # llama.cpp's default ids of SentencePiece vocabularies
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # in tokenizer.ggml.token_type
TEMPLATES = "tokenizer.chat_template"  # further templates have a dot and a name after it
LONGEST = 1024  # most characters of a vocabulary entry
_TEXT, _TRUTH, _INDEX = kind("text", str), kind("true or false", bool), whole(0, 2**32)
HONOURED = {  # entry: rule of its value
    **{f"{GGML}{name}_token_id": _INDEX for name in SPECIAL.values()},
    **{f"{GGML}{name}_token_id": _INDEX for name in ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")},
    **{f"{GGML}{name}": _TEXT for name in ("model", "pre")},
    **{f"{GGML}{name}": listed(_TEXT) for name in ("tokens", "merges")},
    **{f"{GGML}add_{name}": _TRUTH for name in ("bos_token", "eos_token", "space_prefix")},
    f"{GGML}token_type": listed(whole(0, 255)),
    f"{GGML}scores": listed(real(-1e30, 1e30)),
    f"{GGML}suppress_tokens": listed(whole(-TOKENS, 2**32)),
    TEMPLATES: _TEXT,
}
_INFILLING = "it is for filling a gap in a text, which is not supported here; in text it is a token like any other"
_UNIGRAM = "used only by Unigram vocabularies; llama.cpp ignores it in all others"
_BERT = "used only by BERT models"
IGNORED = {
    **{f"{GGML}fim_{part}_token_id": _INFILLING for part in ("pre", "suf", "mid")},
    **{f"{GGML}{part}_token_id": _INFILLING for part in ("prefix", "suffix", "middle")},
    f"{GGML}add_sep_token": "it separates the two texts of a pair, and pairs are not used here",
    f"{GGML}cls_token_id": _BERT,
    f"{GGML}token_type_count": _BERT,
    f"{GGML}normalizer.lowercase": _BERT,
    f"{GGML}normalizer.strip_accents": _BERT,
    f"{GGML}remove_extra_whitespaces": _UNIGRAM,
    f"{GGML}precompiled_charsmap": _UNIGRAM,
    "tokenizer.chat_templates": "the names of the further chat templates, each of which is an entry of its own",
    "tokenizer.huggingface.json": "the same tokenizer once more; llama.cpp reads the other entries",
    "tokenizer.rwkv.world": "used only by RWKV models",
}
# Texts of tokens that llama.cpp treats as control tokens and as the end of a generation, whatever the file says.
ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>"),
    *("<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>"),
    *("<\uff5cend▁of▁sentence\uff5c>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>"),
    *("<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
}
SPACE = "▁"

_log = logging.getLogger(__name__)


def tokenizer_of(facts: Facts) -> PreTrainedTokenizerBase:
    """Build the file's tokenizer, of a class that is saved and loaded without loss.

    Raises:
        ValueError: an entry is unknown, missing or contradicts the others, or the vocabulary has no row.
    """
    from transformers import PreTrainedTokenizerFast

    _account_for_entries(facts)
    vocabulary, tokens = vocabulary_of(facts), tokens_of(facts)
    kinds = _list(facts, "token_type", len(tokens)) or [1] * len(tokens)
    special = {f"{name}_token": index if index is None else tokens[index] for name, index in special_ids(facts).items()}
    if vocabulary is None:
        backend = _sentencepiece(facts, tokens, special["unk_token"])
    else:
        backend = _model(facts, tokens, _merges(facts), ignore_merges=vocabulary.whole_words)
        backend.pre_tokenizer = splitter(vocabulary)
        backend.decoder = decoders.ByteLevel()
        if vocabulary.composed:
            backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(_added(facts, tokens, kinds, (CONTROL, UNKNOWN)))
    backend.add_tokens(_added(facts, tokens, kinds, (USER_DEFINED,)))
    _frame(facts, backend, special, vocabulary is None or vocabulary.whole_words)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_chat_templates(facts),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _account_for_entries(facts: Facts) -> None:
    unknown = []
    for name in facts.names("tokenizer."):
        if name in IGNORED:
            _log.info("%s: %s is left out: %s", facts.path, name, IGNORED[name])
        elif name in HONOURED or name.startswith(f"{TEMPLATES}."):
            facts.general(name, HONOURED.get(name, _TEXT))
        else:
            unknown.append(f"{name} = {shown(facts.general(name))}")
    if unknown:
        raise ValueError(
            f"{facts.path} says {', '.join(unknown)}, which is not known here and may change the tokens of a text; load the "
            "original checkpoint instead"
        )


def tokens_of(facts: Facts) -> list[str]:
    """Returns the text of every vocabulary entry.

    Raises:
        ValueError: there are none, one occurs twice, or one is longer than LONGEST.
    """
    tokens = facts.general(f"{GGML}tokens")
    if not tokens:
        raise ValueError(f"{facts.path} does not say {GGML}tokens")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]  # as in llama.cpp
    if (longest := max(map(len, tokens))) > LONGEST:
        raise ValueError(f"{facts.path}: {GGML}tokens has an entry of {longest:,} characters; {LONGEST:,} are read at most")
    if len(set(tokens)) < len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise ValueError(f"{facts.path}: {GGML}tokens holds {twice!r} twice; download it again")
    return tokens


def special_ids(facts: Facts) -> dict[str, int | None]:
    """Returns the id of each special token by transformers' name of it; None if the file has none.

    Raises:
        ValueError: an id outside the vocabulary.
    """
    usual = UNSTATED if facts.general(f"{GGML}model") == "llama" else {}
    return {name: _id(facts, f"{entry}_token_id", usual.get(name)) for name, entry in SPECIAL.items()}


def ends_of(facts: Facts) -> list[int]:
    """Returns the ids of tokens that end a generation: end of text, then ends of turns that the file or llama.cpp names."""
    stated = [_id(facts, f"{name}_token_id") for name in ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")]
    by_text = [index for index, token in enumerate(tokens_of(facts)) if token in ENDS]
    found = [index for index in (special_ids(facts)["eos"], *stated, *by_text) if index is not None]
    return list(dict.fromkeys(found))


def suppressed(facts: Facts) -> list[int]:
    """Returns the ids of tokens that are never generated."""
    return [index for index in facts.general(f"{GGML}suppress_tokens") or [] if 0 <= index < facts.count(f"{GGML}tokens")]


def _id(facts: Facts, name: str, usual: int | None = None) -> int | None:
    found, count = facts.general(GGML + name), facts.count(f"{GGML}tokens")
    if found is None:
        return usual if usual is None or usual < count else None
    if not 0 <= found < count:
        raise ValueError(f"{facts.path}: {GGML}{name} is {found}, but there are only {count} tokens; download it again")
    return int(found)


def _list(facts: Facts, name: str, length: int) -> list | None:
    found = facts.general(GGML + name)
    if found is not None and len(found) < length:
        raise ValueError(f"{facts.path}: {GGML}{name} has {len(found)} values for {length} tokens; download it again")
    return found


def _merges(facts: Facts) -> list[tuple[str, str]]:
    merges = facts.general(f"{GGML}merges")
    if merges is None:
        raise ValueError(f"{facts.path} does not say {GGML}merges, without which its vocabulary cannot be used")
    if (odd := next((merge for merge in merges if merge.find(" ", 1) < 0), None)) is not None:
        raise ValueError(f"{facts.path}: {GGML}merges holds {shown(odd)}, which is no pair; download it again")
    return [(merge[: (at := merge.find(" ", 1))], merge[at + 1 :]) for merge in merges]


def _model(facts: Facts, tokens: list[str], merges: list[tuple[str, str]], **options) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, **options))
    except Exception as error:  # tokenizers does not export the class of this error
        raise ValueError(
            f"{facts.path}: its merges and its tokens do not belong together: {error}; download it again"
        ) from error


def _sentencepiece(facts: Facts, tokens: list[str], unknown: str | None) -> Tokenizer:
    """Build a SentencePiece tokenizer, which keeps all spaces.

    By default a space is added before text, as in llama.cpp, except for Gemma, whose own tokenizer never adds one.
    """
    scores = _list(facts, "scores", len(tokens)) or [0.0] * len(tokens)
    backend = _model(facts, tokens, merges_of(tokens, scores), byte_fallback=True, fuse_unk=True, unk_token=unknown)
    stated = facts.general(f"{GGML}add_space_prefix")
    prefix = not facts.architecture.startswith("gemma") if stated is None else stated
    before, after = ([normalizers.Prepend(SPACE)], [decoders.Strip(" ", 1, 0)]) if prefix else ([], [])
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    return backend


def merges_of(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Returns every pair of entries that joins to an entry, in order of falling score of the joined entry."""
    entries, found = set(tokens), []
    for index in sorted(range(len(tokens)), key=lambda index: -scores[index]):
        token = tokens[index]
        parts = ((token[:at], token[at:]) for at in range(1, len(token)))
        found += [(left, right) for left, right in parts if left in entries and right in entries]
    return found


def _added(facts: Facts, tokens: list[str], kinds: Sequence[int], wanted: tuple[int, ...]) -> list[AddedToken]:
    """Returns the tokens that are matched in text before it is split; in Phi-3, most of them swallow spaces after them."""
    name = (facts.general("general.name", _TEXT) or "").lower()
    phi3 = "phi-3" in name or "phi3" in name
    return [
        AddedToken(
            token,
            special=CONTROL in wanted,
            normalized=False,
            rstrip=phi3 and token not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for token, kind in zip(tokens, kinds, strict=False)
        if (CONTROL if token in ENDS else kind) in wanted
    ]


def _chat_templates(facts: Facts) -> str | dict[str, str] | None:
    usual = facts.general(TEMPLATES)
    further = {name.removeprefix(f"{TEMPLATES}."): facts.general(name) for name in facts.names(f"{TEMPLATES}.")}
    if not further:
        return usual
    return further if usual is None else {"default": usual, **further}


def _frame(facts: Facts, backend: Tokenizer, special: dict, begins: bool) -> None:
    """Set the tokens before and after every text: as the file says, else the default of its kind of vocabulary."""
    stated = facts.general(f"{GGML}add_bos_token")
    bos = special["bos_token"] if (begins if stated is None else stated) else None
    eos = special["eos_token"] if facts.general(f"{GGML}add_eos_token") else None
    around = [token for token in (bos, eos) if token is not None]
    single = [token for token in (bos, "$A", eos) if token is not None]
    pair = [*single, *("$B:1" if token == "$A" else f"{token}:1" for token in single)]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, backend.token_to_id(token)) for token in around]
    )


def load(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a converted folder. For qwen2 models, transformers' `AutoTokenizer` would use Qwen's rules."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)
