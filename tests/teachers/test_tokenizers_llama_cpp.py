"""Tokenizers of GGUF files beside llama.cpp's own, text by text (`make test-tokenizers`)."""

import random
import unicodedata
from pathlib import Path

import pytest

from teachers.gguf import read
from teachers.gguf_tokenizer import tokenizer_of
from teachers.gguf_vocabulary import VOCABULARIES
from teachers.source import resolve
from tests.conftest import SMOLLM2
from tests.teachers.llama_cpp import (
    LlamaCpp,
    texts,
    trained,
    trained_pieces,
    write_pieces,
    write_trained_pieces,
    write_vocabulary,
)

pytestmark = [pytest.mark.llama_cpp, pytest.mark.usefixtures("own_cache")]
OURS = {"gpt2"}  # a name that llama.cpp does not know
MARKS = [("<|end|>", 3), ("<|assistant|>", 3), ("<|endoftext|>", 3), ("<think>", 4)]
SPACES = [("  ", 4), ("\n\n", 4), ("\t", 4)]
APPROXIMATED = {"tekken", "gpt-4o", "llama4", "kanana2"}  # llama.cpp takes cased letters beyond ASCII, and marks, for others


@pytest.fixture(scope="module")
def vocabulary():
    return trained()


def disagreements(path, compared):
    judge, tokenizer = LlamaCpp(path), tokenizer_of(read(path))
    return [text for text in compared if tokenizer(text).input_ids != judge.ids(text, whole=True)]


def plain(text):
    """No cased letter beyond ASCII, and no mark."""
    cased = ("Lu", "Ll", "Lt", "Mn", "Mc", "Me")
    return all(char.isascii() or unicodedata.category(char) not in cased for char in text)


def test_smollm2():
    assert not disagreements(Path(resolve(SMOLLM2).location), texts(20_000, seed=3))


@pytest.mark.parametrize("name", [None, *sorted(VOCABULARIES.keys() - OURS)])
def test_every_name(tmp_path, vocabulary, name):
    compared = texts(3000)
    if name in APPROXIMATED:
        compared = [text for text in compared if plain(text)]
    if name is not None and VOCABULARIES[name].composed:  # llama.cpp does not compose
        compared = [unicodedata.normalize("NFC", text) for text in compared]
    assert len(compared) > 1500
    assert not disagreements(write_vocabulary(tmp_path / "tiny.gguf", *vocabulary, name), compared)


@pytest.fixture(scope="module")
def pieces():
    return trained_pieces()


@pytest.mark.parametrize(
    ("marks", "name", "flags"),
    [
        ([], "Llama 2", {}),
        (MARKS, "Mistral 7B", {"add_bos_token": True}),
        (MARKS, "Phi 3 Mini (phi-3)", {}),
        (MARKS + SPACES, "Gemma 3", {"add_space_prefix": False}),
    ],
    ids=["llama", "mistral", "phi3", "gemma"],
)
def test_sentencepiece(tmp_path, pieces, marks, name, flags):
    chance, parts = random.Random(4), ["a b", " Hello", "\n", " ", "x1  ", "12 ", "</s>", "<s>", "<unk>", *dict(marks)]
    marked = ["".join(chance.choices(parts, k=chance.randint(1, 12))) for _ in range(1000)]
    compared = [text for text in texts(3000) if "\x00" not in text] + marked
    assert not disagreements(write_trained_pieces(tmp_path / "tiny.gguf", *pieces, marks, name, flags), compared)


@pytest.mark.parametrize("flag", ["add_bos_token", "add_eos_token", "add_space_prefix"])
@pytest.mark.parametrize("stated", [False, True])
@pytest.mark.parametrize("name", ["smollm", "llama-bpe", None])
def test_entries_about_tokens_around_text(tmp_path, vocabulary, name, flag, stated):
    path = tmp_path / "tiny.gguf"
    flags = {flag: stated}
    path = write_pieces(path, flags) if name is None else write_vocabulary(path, *vocabulary, name, flags)
    compared = [text for text in texts(1000) if "\x00" not in text]  # a C string to llama.cpp's SentencePiece
    assert not disagreements(path, [*compared, "", " a", "  ab", " <s>ab", "a</s>  b"])


@pytest.mark.parametrize("name", ["no-such-name", *OURS])
def test_llama_cpp_refuses_other_names(tmp_path, vocabulary, name):
    with pytest.raises(Exception, match="Failed to init"):
        LlamaCpp(write_vocabulary(tmp_path / "tiny.gguf", *vocabulary, name))
