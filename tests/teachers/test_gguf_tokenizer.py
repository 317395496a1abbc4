"""How the names of GGUF vocabularies split text, and what the file says of the tokens around it.

The right pieces are llama.cpp's; `make test-tokenizers` asks llama.cpp itself.
"""

from pathlib import Path

import pytest
from gguf.constants import Keys

import teachers
from teachers.gguf import read
from teachers.gguf_tokenizer import GGML, HONOURED, IGNORED, ends_of, load, merges_of
from teachers.gguf_tokenizer import tokenizer_of as read_tokenizer
from teachers.gguf_vocabulary import VOCABULARIES, splitter
from tests.teachers.gguf_cases import CASES
from tests.teachers.gguf_files import random_model, write

pytestmark = pytest.mark.usefixtures("own_cache")

KIND = {"deepseek-r1-qwen": "qwen2"}  # names that split as another
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


@pytest.fixture(scope="module")
def models():
    return {case: random_model(CASES[case]) for case in ("llama", "qwen2", "phi3", "gemma3")}


@pytest.fixture
def written(tmp_path, models):
    """Writes a file of a case and reads it."""
    return lambda case, **further: read(write(CASES[case], models[case], tmp_path / "tiny.gguf", **further))


class Entry:
    """An entry that no writer would write."""

    def __init__(self, value):
        self.value, self.data = value, value if isinstance(value, list) else [value]

    def contents(self):
        return self.value


def ggml(**entries):
    return {"flags": {GGML + name: value for name, value in entries.items()}}


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


@pytest.mark.parametrize(("case", "pre"), [("llama", "smollm"), ("qwen2", "gpt-2"), ("qwen2", "deepseek-r1-qwen")])
def test_a_teacher_splits_by_the_name(tmp_path, models, case, pre):
    """Of Qwen's models too, to which transformers would give Qwen's own tokenizer by their type."""
    flags = {
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ 1 }}",
        "tokenizer.chat_template.tools": "2",
    }
    path = write(CASES[case], models[case], tmp_path / "tiny.gguf", pre=pre, flags=flags)
    tokenizer = teachers.load(str(path)).tokenizer
    assert tokenizer.backend_tokenizer.to_str() == read_tokenizer(read(path)).backend_tokenizer.to_str()
    tokenizer.save_pretrained(tmp_path / "saved")  # as a student's is
    assert pieces(load(tmp_path / "saved").backend_tokenizer.pre_tokenizer, TEXT) == PIECES[KIND.get(pre, pre)]
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab").input_ids) == ["<s>", "ab"]
    assert tokenizer.chat_template == {"default": "{{ 1 }}", "tools": "2"}


@pytest.mark.parametrize(
    ("name", "said"), [("no-such-name", "known are a.x-4.0, "), ("llama-bep", "did you mean 'llama-bpe'")]
)
def test_other_names_are_refused(written, name, said):
    with pytest.raises(ValueError, match=rf"tiny\.gguf: tokenizer\.ggml\.pre is '{name}', .*{said}"):
        read_tokenizer(written("llama", pre=name))


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
        ("gemma3", {"add_space_prefix": True}, ["<s>", "▁", "ab"]),
    ],
)
def test_tokens_around_text(written, case, flags, right):
    tokenizer = read_tokenizer(written(case, **ggml(**flags)))
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab").input_ids) == right
    assert tokenizer.decode(tokenizer("ab").input_ids, skip_special_tokens=True) == "ab"


def test_tokens_with_a_part_to_play(written):
    tokenizer = read_tokenizer(written("llama", **ggml(seperator_token_id=7, mask_token_id=8, padding_token_id=9)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, None)
    assert (tokenizer.sep_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id) == (7, 8, 9)


def test_sentencepiece_ids_that_the_file_does_not_say(written):
    facts = written("phi3")
    for name in ("bos", "eos", "unknown"):
        facts._fields.pop(f"{GGML}{name}_token_id", None)
    tokenizer = read_tokenizer(facts)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer("ab").input_ids[0] == 1


@pytest.mark.parametrize(
    ("entries", "right"),
    [
        ({}, [2]),
        ({"eot_token_id": 270}, [2, 270]),
        ({"eot_token_id": 270, "eom_token_id": 271, "eos_token_id": 272, "fim_sep_token_id": 273}, [272, 270, 271, 273, 2]),
    ],
)
def test_ends_of_generation(written, entries, right):
    facts = written("llama")
    for name, value in entries.items():
        facts._fields[GGML + name] = Entry(value)
    assert ends_of(facts) == right


def test_a_teacher_knows_every_end(tmp_path, models):
    flags = ggml(eot_token_id=270, suppress_tokens=[5, 6, 900])
    teacher = teachers.load(str(write(CASES["llama"], models["llama"], tmp_path / "tiny.gguf", **flags)))
    settings = teacher.model.generation_config
    assert (settings.eos_token_id, settings.suppress_tokens, settings.bos_token_id) == ([2, 270], [5, 6], 1)
    assert (teacher.config.bos_token_id, teacher.config.eos_token_id) == (1, 2) == (1, teacher.tokenizer.eos_token_id)


def test_smollm2_ends_where_llama_cpp_ends(smollm2):
    ends = smollm2.tokenizer.convert_ids_to_tokens(smollm2.model.generation_config.eos_token_id)
    assert ends == ["<|im_end|>", "<|endoftext|>", "<reponame>"]


def test_every_entry_of_the_format_is_accounted_for():
    known = {name for name in vars(Keys.Tokenizer).values() if isinstance(name, str) and name.startswith("tokenizer.")}
    assert known - set(HONOURED) - set(IGNORED) == {"tokenizer.chat_template.{name}"}
    assert not set(HONOURED) & set(IGNORED) and all(len(reason) > 20 for reason in IGNORED.values())
    page = Path(__file__).parents[2].joinpath("docs", "gguf.md").read_text()
    assert not [name for name in set(HONOURED) | set(IGNORED) if f"`{name}`" not in page]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tokenizer.ggml.model_of_words": "x"}, r"says tokenizer\.ggml\.model_of_words = 'x', which is not known"),
        ({"tokenizer.other": 3}, r"says tokenizer\.other = 3, which is not known"),
        ({"tokenizer.ggml.eot_token_id": 300}, r"eot_token_id is 300, but there are only 300 tokens"),
        ({"tokenizer.ggml.mask_token_id": 4000}, r"mask_token_id is 4000, but there are only 300 tokens"),
    ],
)
def test_entries_that_are_refused(written, flags, said):
    with pytest.raises(ValueError, match=said):
        facts = written("llama", flags=flags)
        read_tokenizer(facts), ends_of(facts)


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("model", "t5", r"tokenizer\.ggml\.model is 't5'; only 'gpt2' \(byte-level\)"),
        ("model", "bert", r"tokenizer\.ggml\.model is 'bert'"),
        ("tokens", ["a", "b", "a"], r"tokens holds 'a' twice"),
        ("tokens", [], r"does not say tokenizer\.ggml\.tokens"),
        ("token_type", [1, 1], r"token_type has 2 values for 300 tokens"),
        ("merges", ["a b", "b nothing"], r"merges and its tokens do not belong together"),
        ("merges", None, r"does not say tokenizer\.ggml\.merges"),
    ],
)
def test_vocabularies_that_are_refused(written, entry, value, said):
    facts = written("llama")
    facts._fields[GGML + entry] = Entry(value)
    with pytest.raises(ValueError, match=said):
        read_tokenizer(facts)


def test_an_ignored_entry_changes_nothing(written, caplog):
    caplog.set_level("INFO")
    usual, further = (read_tokenizer(written("llama", **ggml(**entries))) for entries in ({}, {"fim_pre_token_id": 5}))
    assert usual.backend_tokenizer.to_str() == further.backend_tokenizer.to_str()
    assert "fim_pre_token_id is left out: it is for filling a gap in a text" in caplog.text


def test_merges_follow_the_scores():
    assert merges_of(["a", "b", "ab", "ba", "aba", "x"], [0, 0, -3, -1, -2, 0]) == [
        ("b", "a"),
        ("a", "ba"),
        ("ab", "a"),
        ("a", "b"),
    ]


def test_phi3_swallows_spaces_behind_its_marks(written):
    facts = written("phi3")
    facts._fields["general.name"] = Entry("Phi 3 Mini Phi-3")
    for kinds in (None, [3]):
        if kinds:
            facts._fields["general.name"] = Entry("Another")
        tokenizer = read_tokenizer(facts)
        right = ["<s>", "</s>", "▁", "ab"] if kinds is None else ["<s>", "</s>", "▁", "▁", "▁", "ab"]
        assert tokenizer.convert_ids_to_tokens(tokenizer("</s>  ab").input_ids) == right
