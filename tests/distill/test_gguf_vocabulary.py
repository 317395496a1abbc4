"""Tokenizers in GGUF files: read back, they cut text as before; tokenizers that llama.cpp lacks are refused by name.

`make test-tokenizers` also compares every one with llama.cpp itself.
"""

import json
import re

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from distill.exporters.gguf_files.vocabulary import vocabulary
from distill.exporters.gguf_files.writing import write_file
from teachers.gguf import read
from teachers.gguf_tokenizer import tokenizer_of
from tests.teachers.llama_cpp import LlamaCpp, texts, trained, trained_pieces

# Spelled out as the models' own tokenizer.json files do.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


def by(expression):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), BYTES])


@pytest.fixture(scope="module")
def words():
    return trained(1500)


@pytest.fixture(scope="module")
def pieces():
    return trained_pieces(800)


def byte_level(words, cutter, normalizer=None, marks=(), frame=None, **options):
    """A tokenizer of bytes, with further tokens for chats."""
    tokens, merges = words
    ids = {token: index for index, token in enumerate(tokens)}
    raw = Tokenizer(models.BPE(vocab=ids, merges=[tuple(pair.split(" ")) for pair in merges], **options))
    raw.pre_tokenizer, raw.decoder = cutter, decoders.ByteLevel()
    if normalizer is not None:
        raw.normalizer = normalizer
    raw.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    raw.add_tokens([AddedToken("<think>", special=False, normalized=False), *marks])
    if frame is not None:
        raw.post_processor = frame
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def of_pieces(pieces, before=True, metaspace=False):
    """A tokenizer of SentencePiece's, as transformers converts one."""
    found = pieces[0]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *(piece for piece in found if len(piece) > 1)]
    tokens += [piece for piece in found if len(piece) == 1]
    known, merges = set(tokens), []
    for piece in found:  # the earlier, the higher its score
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges += [(left, right) for left, right in cuts if left in known and right in known]
    ids = {token: index for index, token in enumerate(tokens)}
    raw = Tokenizer(models.BPE(vocab=ids, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if metaspace:
        raw.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first" if before else "never", split=False)
    else:
        spaces = [normalizers.Replace(" ", "▁")]
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if before else spaces)
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    raw.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def written(tokenizer, path, rows=None):
    """A file of one tiny layer around a tokenizer, which has fewer tokens than the model has rows."""
    size, width = rows or len(tokenizer) + 5, 32
    body = {"block_count": 1, "context_length": 256, "embedding_length": width, "feed_forward_length": width}
    body |= {"attention.head_count": 2, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5}
    entries = vocabulary(tokenizer, size, []) | {f"llama.{name}": value for name, value in body.items()}
    tensors = {"token_embd.weight": torch.ones(size, width), "output_norm.weight": torch.ones(width)}
    tensors |= {f"blk.0.{name}.weight": torch.ones(width) for name in ("attn_norm", "ffn_norm")}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors |= {f"blk.0.{name}.weight": torch.ones(width, width) for name in matrices}
    write_file(path, "llama", entries, lambda: iter(tensors.items()), torch.float32, lambda *_: True)
    return path


KINDS = {
    "gpt-2": lambda words: byte_level(words, GPT2),
    "smollm": lambda words: byte_level(words, pre_tokenizers.Sequence([pre_tokenizers.Digits(True), GPT2])),
    "llama-bpe": lambda words: byte_level(
        words,
        by(LLAMA3),
        ignore_merges=True,
        frame=processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)]),
    ),
    "dbrx": lambda words: byte_level(words, by(LLAMA3)),
    "qwen2": lambda words: byte_level(words, by(QWEN2), normalizers.NFC()),
    "deepseek-r1-qwen": lambda words: byte_level(words, by(QWEN2)),
}
PIECES = {"prepended": {}, "not prepended": {"before": False}, "metaspace": {"metaspace": True}}


@pytest.fixture(params=[*KINDS, *PIECES])
def case(request, words, pieces):
    """A name that a file should have, None of SentencePiece's, and a tokenizer."""
    if request.param in KINDS:
        return request.param, KINDS[request.param](words)
    return None, of_pieces(pieces, **PIECES[request.param])


def test_a_file_read_back_cuts_text_as_the_tokenizer_does(case, tmp_path):
    name, tokenizer = case
    entries = vocabulary(tokenizer, len(tokenizer) + 5, [])
    assert entries["tokenizer.ggml.model"] == ("gpt2" if name else "llama")
    assert entries["tokenizer.ggml.pre"] == (name or "default")
    assert entries["tokenizer.ggml.tokens"][-1].startswith("[PAD") and entries["tokenizer.ggml.token_type"][-5:] == [5] * 5
    back = tokenizer_of(read(written(tokenizer, tmp_path / "a.gguf")))
    compared = [text for text in texts(300) if name or not text.startswith(" ")]
    wrong = [text for text in compared if back(text).input_ids != tokenizer(text).input_ids]
    assert not wrong, wrong[:5]


@pytest.mark.llama_cpp
def test_llama_cpp_cuts_text_as_the_tokenizer_does(case, tmp_path):
    import unicodedata

    name, tokenizer = case
    judge = LlamaCpp(written(tokenizer, tmp_path / "a.gguf"))
    compared = texts(3000)
    if name == "qwen2":  # llama.cpp does not compose characters
        compared = [text for text in compared if unicodedata.is_normalized("NFC", text)]
    if name is None:
        compared = [text for text in compared if "\x00" not in text and text and not text.startswith(" ")]
    wrong = [text for text in compared if judge.ids(text, whole=True) != tokenizer(text).input_ids]
    assert not wrong, wrong[:5]


def test_ends_of_turns_and_the_template_are_written(words):
    tokenizer = byte_level(words, GPT2)
    tokenizer.chat_template = TEMPLATE
    entries = vocabulary(tokenizer, len(tokenizer), [2])
    assert entries["tokenizer.chat_template"] == TEMPLATE
    ids = {name: entries[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "eot")}
    spelled = ["<s>", "</s>", "<unk>", "<|im_end|>"]  # not <|endoftext|>, which the template does not say
    assert list(ids.values()) == tokenizer.convert_tokens_to_ids(spelled)
    kinds = entries["tokenizer.ggml.token_type"]
    assert kinds[ids["eot"]] == 3 and kinds[tokenizer.convert_tokens_to_ids("<think>")] == 4 and kinds[10] == 1
    assert entries["tokenizer.ggml.add_bos_token"] is False is entries["tokenizer.ggml.add_eos_token"]


def test_a_token_that_ends_generation_ends_turns_without_a_template(words):
    tokenizer = byte_level(words, GPT2)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert vocabulary(tokenizer, len(tokenizer), [2, end])["tokenizer.ggml.eot_token_id"] == end
    assert "tokenizer.ggml.eot_token_id" not in vocabulary(tokenizer, len(tokenizer), [2])


def test_further_templates_are_written_by_name(words):
    tokenizer = byte_level(words, GPT2)
    tokenizer.chat_template = {"default": TEMPLATE, "tools": "{{ tools }}"}
    entries = vocabulary(tokenizer, len(tokenizer), [])
    assert entries["tokenizer.chat_template"] == TEMPLATE
    assert entries["tokenizer.chat_template.tools"] == "{{ tools }}" and entries["tokenizer.chat_templates"] == ["tools"]


ODD = {
    "an expression": (
        lambda words: byte_level(words, by(r"\p{L}+|\s+")),
        r"no name for how its tokenizer splits text: \\p{L}\+\|\\s\+$",
    ),
    "whole words": (lambda words: byte_level(words, GPT2, ignore_merges=True), "'default'|'gpt-2'.*whole words before"),
    "a space before": (
        lambda words: byte_level(words, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "splits text by ByteLevel in a way",
    ),
    "another cutter": (
        lambda words: byte_level(words, pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), BYTES])),
        "splits text by Whitespace in a way",
    ),
    "no bytes": (
        lambda words: byte_level(words, pre_tokenizers.Digits(True)),
        "neither encodes text as bytes nor has tokens for single bytes",
    ),
    "lower case": (lambda words: byte_level(words, GPT2, normalizers.Lowercase()), r"rewrites text first \(Lowercase\)"),
    "a greedy token": (
        lambda words: byte_level(words, GPT2, marks=[AddedToken("<mask>", lstrip=True)]),
        "token '<mask>' strips spaces",
    ),
    "a frame": (
        lambda words: byte_level(
            words, GPT2, frame=processors.TemplateProcessing(single=["<unk>", "$A"], special_tokens=[("<unk>", 0)])
        ),
        r"puts the tokens \[0\] around text, but llama.cpp only the bos token",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_llama_cpp_does_not_do_is_refused_by_name(name, words):
    make, why = ODD[name]
    tokenizer = make(words)
    with pytest.raises(ValueError, match=why):
        vocabulary(tokenizer, len(tokenizer), [])


def test_more_tokens_than_rows_are_refused(words):
    tokenizer = byte_level(words, GPT2)
    with pytest.raises(ValueError, match=rf"a token of id {len(tokenizer) - 1}, but its embedding has only 100 rows"):
        vocabulary(tokenizer, 100, [])


def test_other_models_and_merges_without_scores_are_refused(pieces):
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="of type WordPiece"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=words), 2, [])
    said = json.loads(of_pieces(pieces).backend_tokenizer.to_str())
    merges = said["model"]["merges"]
    first = next(at for at in range(len(merges) - 2) if "".join(merges[at]) == "".join(merges[at + 1]))
    apart = "".join(merges[first])
    merges.append(merges.pop(first))  # one of its two ways comes last
    odd = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(said)), bos_token="<s>")
    with pytest.raises(ValueError, match=re.escape(f"merges of its tokenizer that make {apart!r} are not consecutive")):
        vocabulary(odd, len(odd), [])
