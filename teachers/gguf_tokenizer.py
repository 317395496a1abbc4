"""The tokenizer of a GGUF file, split as llama.cpp splits: one row of VOCABULARIES for what a name stands for.

transformers reads the vocabulary and its merges. How text is cut before the merges, what begins and ends it and whether a
whole word needs merges stands here, since transformers knows few of the names that `tokenizer.ggml.pre` may hold. The
expressions are those of the models' own tokenizers, which llama.cpp approximates where its engine has no classes of
cased letters (tekken, gpt-4o).

Of the file's entries `add_bos_token`, `add_eos_token` and `add_space_prefix` are honoured. The last means nothing to a
byte-level vocabulary (model "gpt2"), nor to Gemma's, whose tokenizer never adds a space. `eot_token_id` and the other
ends of a turn are not read: they say where a chat stops and are no part of tokenising. `clean_spaces`, which a name
implies to llama.cpp, concerns decoding alone and is left out.
"""

import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

from teachers.gguf_config import Facts
from teachers.quiet import no_bars_in_logs, no_warnings

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
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O),
}


def vocabulary_of(facts: Facts) -> Vocabulary | None:
    """The row of a file's vocabulary, None where it is a SentencePiece one, which has no name.

    Raises:
        ValueError: the file names a vocabulary without a row.
    """
    if facts.general("tokenizer.ggml.model") != "gpt2":
        return None
    name = facts.general("tokenizer.ggml.pre") or "default"  # as llama.cpp
    if name not in VOCABULARIES:
        close = get_close_matches(name, VOCABULARIES, n=1, cutoff=0.6)
        raise ValueError(
            f"{facts.path}: tokenizer.ggml.pre is {name!r}, and how that splits text is not known here"
            f"{f'; did you mean {close[0]!r}?' if close else ';'} known are {', '.join(sorted(VOCABULARIES))}: load the "
            "original checkpoint instead"
        )
    return VOCABULARIES[name]


def tokenizer_of(facts: Facts):
    """The file's tokenizer, of a class that keeps every part of it when it is saved and loaded.

    Raises:
        ValueError: transformers cannot read it, or its vocabulary has no row.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = vocabulary_of(facts)
    try:
        with no_warnings(), no_bars_in_logs():  # they are about a config that transformers makes here and nobody uses
            tokenizer = AutoTokenizer.from_pretrained(facts.path.parent, gguf_file=facts.path.name)
    except (OSError, KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"transformers cannot read the tokenizer in {facts.path}: {error}") from error
    backend, tokens = tokenizer.backend_tokenizer, facts.general("tokenizer.ggml.tokens")
    special = {}
    for name, entry in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = facts.general(f"tokenizer.ggml.{entry}_token_id")
        special[f"{name}_token"] = None if index is None else tokens[index]  # transformers 5.17 has its own
    if vocabulary is not None:
        backend.pre_tokenizer = splitter(vocabulary)
        backend.normalizer = normalizers.NFC() if vocabulary.composed else None
        backend.model.ignore_merges = vocabulary.whole_words
    elif not facts.architecture.startswith("gemma"):
        _pieces(backend, facts.general("tokenizer.ggml.add_space_prefix") is not False)
    _frame(facts, backend, special, vocabulary is None or vocabulary.whole_words)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **special)


def splitter(vocabulary: Vocabulary) -> pre_tokenizers.PreTokenizer:
    """What cuts text into the pieces that are merged one by one, and spells their bytes."""
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in vocabulary.splits]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pieces(backend: Tokenizer, prefix: bool) -> None:
    """Spaces of a SentencePiece vocabulary: all are kept, and one more may stand before text, as llama.cpp has it."""
    before, after = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if prefix else ([], [])
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after])


def _frame(facts: Facts, backend: Tokenizer, special: dict, begins: bool) -> None:
    """Tokens before and after every text: what the file says, else what its kind of vocabulary does."""
    stated = facts.general("tokenizer.ggml.add_bos_token")
    bos = special["bos_token"] if (begins if stated is None else stated) else None
    eos = special["eos_token"] if facts.general("tokenizer.ggml.add_eos_token") else None
    around = [token for token in (bos, eos) if token is not None]
    single = [token for token in (bos, "$A", eos) if token is not None]
    pair = [*single, *("$B:1" if token == "$A" else f"{token}:1" for token in single)]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, backend.token_to_id(token)) for token in around]
    )


def save(facts: Facts, tokenizer, folder: Path) -> None:
    """Save a file's tokenizer beside its model.

    Tokens that are none of the file's are taken out: transformers' classes bring their own, such as <|endoftext|>, and
    give them ids past the model's embeddings.

    Raises:
        ValueError: transformers would load another tokenizer from there. Of models of type qwen2 it always makes Qwen's.
    """
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    kept = [token for token in content["added_tokens"] if token["id"] < facts.count("tokenizer.ggml.tokens")]
    if len(kept) < len(content["added_tokens"]):
        file.write_text(json.dumps(content | {"added_tokens": kept}, ensure_ascii=False))
    loaded = json.loads(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    if changed := [part for part in ("pre_tokenizer", "post_processor") if loaded[part] != content[part]]:
        raise ValueError(
            f"{facts.path}: tokenizer.ggml.pre is {facts.general('tokenizer.ggml.pre')!r}, but transformers loads the "
            f"tokenizer of a {facts.architecture} model with another {' and '.join(changed)}; load the original checkpoint "
            "instead"
        )
