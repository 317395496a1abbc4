"""How the names of GGUF vocabularies split text, and what the file says of the tokens around it.

The right pieces are llama.cpp's; `make test-tokenizers` asks llama.cpp itself.
"""

import pytest
from transformers import AutoTokenizer

from teachers.gguf import converted
from teachers.gguf_tokenizer import VOCABULARIES, splitter
from tests.teachers.gguf_files import CASES, random_model, write

TEXT = "I'LL pay  $1234.5\n\n7x"
PIECES = {
    "smollm": ["I", "'", "LL", " pay", " ", " $", "1", "2", "3", "4", ".", "5", "\n\n", "7", "x"],
    "gpt-2": ["I", "'", "LL", " pay", " ", " $", "1234", ".", "5", "\n", "\n", "7", "x"],
    "default": ["I", "'", "LL", " pay", "  ", "$", "123", "4", ".", "5", "\n", "\n", "7", "x"],
    "llama-bpe": ["I", "'LL", " pay", " ", " $", "123", "4", ".", "5", "\n\n", "7", "x"],
    "qwen2": ["I", "'LL", " pay", " ", " $", "1", "2", "3", "4", ".", "5", "\n\n", "7", "x"],
    "tekken": ["I", "'LL", " pay", " ", " $", "1", "2", "3", "4", ".", "5", "\n\n", "7", "x"],
    "gpt-4o": ["I'LL", " pay", " ", " $", "123", "4", ".", "5", "\n\n", "7", "x"],
}


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    if "smollm2" not in request.fixturenames:
        monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))


def tokenizer_of(tmp_path, case, **written):
    return AutoTokenizer.from_pretrained(
        converted(write(CASES[case], random_model(CASES[case]), tmp_path / "tiny.gguf", **written))
    )


def pieces(cutter, text):
    return [text[start:end] for _, (start, end) in cutter.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", PIECES)
def test_pieces(name):
    assert pieces(splitter(VOCABULARIES[name]), TEXT) == PIECES[name]


def test_names_of_one_kind():
    for kind, names in {"llama-bpe": ["llama3", "falcon3"], "gpt-2": ["gpt2"], "smollm": ["starcoder"]}.items():
        assert all(VOCABULARIES[name] == VOCABULARIES[kind] for name in names)
    assert VOCABULARIES["dbrx"].splits == VOCABULARIES["llama-bpe"].splits and not VOCABULARIES["dbrx"].whole_words
    assert VOCABULARIES["deepseek-r1-qwen"].splits == VOCABULARIES["qwen2"].splits


def test_smollm2_has_its_own_splitting(smollm2):
    """The ids that llama.cpp and the model's own tokenizer give."""
    assert smollm2.tokenizer("\n\n5").input_ids == [1116, 37]
    assert smollm2.tokenizer("a  5").input_ids == [81, 256, 37]


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen3"])
def test_what_was_converted_splits_by_the_name(tmp_path, case):
    """Of Qwen 3's models too, to which transformers would give another tokenizer by its class."""
    cutter = tokenizer_of(tmp_path, case, pre="smollm").backend_tokenizer.pre_tokenizer
    assert pieces(cutter, TEXT) == PIECES["smollm"]


@pytest.mark.parametrize(
    ("name", "said"), [("no-such-name", "known are a.x-4.0, "), ("llama-bep", "did you mean 'llama-bpe'")]
)
def test_other_names_are_refused(tmp_path, name, said):
    with pytest.raises(ValueError, match=rf"tiny\.gguf: tokenizer\.ggml\.pre is '{name}', .*{said}"):
        tokenizer_of(tmp_path, "llama", pre=name)


def test_a_qwen2_model_with_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"pre is 'gpt-2', but transformers loads the tokenizer of a qwen2 model with"):
        tokenizer_of(tmp_path, "qwen2", pre="gpt-2")


@pytest.mark.parametrize(
    ("case", "flags", "right"),
    [
        ("llama", {}, ["ab"]),
        ("llama", {"add_bos_token": True}, ["<s>", "ab"]),
        ("llama", {"add_bos_token": True, "add_eos_token": True}, ["<s>", "ab", "</s>"]),
        ("llama", {"add_space_prefix": True}, ["ab"]),
        ("phi3", {}, ["<s>", "▁", "ab"]),
        ("phi3", {"add_space_prefix": False}, ["<s>", "ab"]),
        ("phi3", {"add_bos_token": False, "add_eos_token": True}, ["▁", "ab", "</s>"]),
        ("gemma3", {}, ["<s>", "ab"]),
    ],
)
def test_tokens_around_text(tmp_path, case, flags, right):
    tokenizer = tokenizer_of(tmp_path, case, flags={f"tokenizer.ggml.{name}": flag for name, flag in flags.items()})
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab").input_ids) == right
    assert tokenizer.decode(tokenizer("ab").input_ids, skip_special_tokens=True) == "ab"
