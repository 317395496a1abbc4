"""Headers of GGUF files that lie: each ends in one message, before anything is made of what they promise."""

import copy
import struct

import pytest

from teachers.gguf import config, read
from tests.teachers.gguf_bytes import ARRAY, BOOL, F64, STRING, U32, U64, apart, array, f32, floats, text, texts, u32
from tests.teachers.gguf_cases import CASES
from tests.teachers.gguf_files import random_model, write

NAN = float("nan")
TAB = struct.pack("<IQ", U32, 1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Files that are right, taken apart, by architecture."""
    folder, found = tmp_path_factory.mktemp("gguf"), {}
    for name in ("llama", "gemma2"):
        found[name] = apart(write(CASES[name], random_model(CASES[name]), str(folder / f"{name}.gguf")))
    return found


# entry, its value (None: taken away), what is said
ENTRIES = [
    ("llama.attention.head_count", u32(0), "head_count is 0; it should be a whole number from 1 to 65,536"),
    ("llama.attention.head_count", u32(3), "head_count_kv is 2, which does not divide the 3 heads"),
    ("llama.attention.head_count", u32(6), "head_count is 6, but the first layer's queries have 256 rows"),
    ("llama.attention.head_count", text("4"), "head_count is '4'; it should be a whole number"),
    ("llama.attention.head_count", f32(4.0), "head_count is 4.0; it should be a whole number"),
    ("llama.attention.head_count", (BOOL, b"\x01"), "head_count is True; it should be a whole number"),
    ("llama.attention.head_count", array(U32, 2, struct.pack("<II", 4, 4)), "head_count differs from layer to layer"),
    ("llama.attention.head_count_kv", u32(0), "head_count_kv is 0; it should be"),
    ("llama.attention.head_count_kv", array(U32, 2, struct.pack("<II", 2, 0)), "differs from layer to layer"),
    ("llama.block_count", u32(2**31), "block_count is 2147483648; it should be a whole number from 1 to 1,024"),
    ("llama.block_count", (U64, struct.pack("<Q", 2**60)), "block_count is 1152921504606846976"),
    ("llama.block_count", array(ARRAY, 1, TAB + bytes(4)), "'llama.block_count' is an array of arrays"),
    ("llama.block_count", None, "does not say llama.block_count"),
    ("llama.context_length", u32(0), "context_length is 0"),
    (
        "llama.embedding_length",
        u32(2**31),
        "embedding_length is 2147483648; it should be a whole number from 1 to 1,048,576",
    ),
    ("llama.attention.layer_norm_rms_epsilon", f32(NAN), "epsilon is nan; it should be a number from 0 to 1"),
    ("llama.attention.layer_norm_rms_epsilon", f32(-1.0), "epsilon is -1.0"),
    ("llama.rope.freq_base", f32(NAN), "freq_base is nan"),
    ("llama.rope.freq_base", f32(0.0), "freq_base is 0.0"),
    ("llama.rope.scaling.factor", f32(float("inf")), "factor is inf"),
    ("llama.rope.scaling.factor", (F64, struct.pack("<d", 1e300)), r"factor is 1e\+300"),
    ("llama.rope.scaling.type", u32(1), "scaling.type is 1; it should be text"),
    ("llama.expert_count", text("none"), "expert_count is 'none'"),
    ("llama.attention.key_length", u32(0), "key_length is 0"),
    ("llama.attention.sliding_window", f32(NAN), "sliding_window is nan"),
    ("general.architecture", u32(3), "general.architecture is 3; it should be text"),
    ("general.architecture", None, "does not say general.architecture"),
    ("general.architecture", text("x" * 5000), "is a 'xxxx.*; GGUF files are read of llama"),
    ("general.alignment", u32(0), "general.alignment is 0 of type 4; it should be a power of two"),
    ("general.alignment", u32(48), "general.alignment is 48"),
    ("general.alignment", text("32"), "general.alignment is 32 of type 8"),
    ("tokenizer.ggml.tokens", array(STRING, 2**60), "has 1,152,921,504,606,846,976 values; all arrays together may have"),
    (
        "tokenizer.ggml.scores",
        array(6, 2**21, b""),
        "it ends early: its entry 'tokenizer.ggml.scores' needs 8,388,608 bytes",
    ),
    ("general.name", (STRING, struct.pack("<Q", 2**60)), "'general.name' would have 1,152,921,504,606,846,976 bytes"),
    ("general.name", text(b"\xff\xfe"), "'general.name' is no UTF-8"),
    ("general.name", (99, b""), "is of the type 99, which GGUF does not have"),
    ("general.name", array(99, 1, bytes(8)), "is an array of the type 99"),
    ("tokenizer.ggml.add_bos_token", (BOOL, b"\x07"), "is neither true nor false"),
]


@pytest.mark.parametrize(("name", "value", "said"), ENTRIES)
def test_entries(parts, tmp_path, name, value, said):
    damaged = copy.copy(parts["llama"])
    damaged.set(name, value)
    file = tmp_path / "x.gguf"
    damaged.write(file)
    with pytest.raises(ValueError, match=said) as raised:
        config(file)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("tokens", u32(3), "tokens is 3; it should be a list"),
        ("tokens", texts(["a", "a"]), "tokens holds 'a' twice"),
        ("tokens", texts(["a" * 2000]), "tokens has an entry of 2,000 characters"),
        ("tokens", texts([]), "does not say tokenizer.ggml.tokens"),
        ("merges", texts(["ab"]), "merges holds 'ab', which is no pair"),
        ("merges", floats([1.0]), "merges is .*; it should be a list, each entry text"),
        ("token_type", floats([1.0] * 300), "token_type is .*; it should be a list, each entry a whole number"),
        ("bos_token_id", u32(2**32 - 1), "bos_token_id is 4294967295, but there are only 300 tokens"),
        ("bos_token_id", f32(NAN), "bos_token_id is nan; it should be a whole number"),
        ("add_bos_token", text("yes"), "add_bos_token is 'yes'; it should be true or false"),
        ("suppress_tokens", u32(1), "suppress_tokens is 1; it should be a list"),
        ("pre", u32(7), "pre is 7; it should be text"),
    ],
)
def test_entries_of_the_tokenizer(parts, tmp_path, name, value, said):
    from teachers.gguf_tokenizer import tokenizer_of

    damaged = copy.copy(parts["llama"])
    damaged.set(f"tokenizer.ggml.{name}", value)
    with pytest.raises(ValueError, match=said):
        tokenizer_of(read(damaged.write(tmp_path / "x.gguf")))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("attention.sliding_window_pattern", u32(0), "sliding_window_pattern is 0"),
        ("attention.sliding_window_pattern", array(BOOL, 1, b"\x01"), "pattern has 1 entries for 4 layers"),
        (
            "attention.sliding_window_pattern",
            texts(["a"] * 4),
            "pattern is .*; it should be a list, each entry true or false",
        ),
        ("final_logit_softcapping", f32(0.0), "final_logit_softcapping is 0.0"),
        ("attn_logit_softcapping", f32(NAN), "attn_logit_softcapping is nan"),
        ("rope.freq_base_swa", f32(-1.0), "freq_base_swa is -1.0"),
    ],
)
def test_entries_of_gemma(parts, tmp_path, name, value, said):
    damaged = copy.copy(parts["gemma2"])
    damaged.set(f"gemma2.{name}", value)
    with pytest.raises(ValueError, match=said):
        config(damaged.write(tmp_path / "x.gguf"))


def name_twice(parts):
    parts.entries = [*parts.entries, parts.entries[1]]


def change(**what):
    """Change what the header says of the last tensor."""

    def damage(parts):
        name, shape, kind, offset = parts.tensors[-1]
        new = {"name": name, "shape": shape, "kind": kind, "offset": offset} | what
        parts.tensors = [*parts.tensors[:-1], list(new.values())]

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (name_twice, "it has the entry '.*' twice"),
        (change(name="token_embd.weight"), "it has the tensor 'token_embd.weight' twice"),
        (change(name="x" * 2000), "would have 2,000 bytes; 1,024 are read at most"),
        (change(offset=2**40), "would end at byte 1,099"),
        (change(offset=3), "begins at 3, which is no multiple of the alignment 32"),
        (change(kind=77), "is of the type 77, which this version of gguf does not know"),
        (change(kind=4), "is of the type 4"),
        (change(shape=[2**40, 2**40]), "would end at byte"),
        (change(shape=[0]), r"has the shape \[0\]"),
        (change(shape=[1] * 9), "has 9 dimensions; 1 to 4 are read"),
        (change(kind=2, shape=[31]), r"has the shape \[31\], which does not fit blocks of 32 values"),
    ],
)
def test_tensors(parts, tmp_path, damage, said):
    damaged = copy.copy(parts["llama"])
    damage(damaged)
    file = tmp_path / "x.gguf"
    damaged.write(file)
    with pytest.raises(ValueError, match=said):
        read(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GGUX" + bytes(40), r"it begins with b'GGUX'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "it is of version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "it promises 1,152,921,504,606,846,976 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "it promises 1,152,921,504,606,846,976 entries"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 1), "it ends early: the name of entry 0"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**63), "the name of entry 0 would have"),
        (b"", "it has 0 bytes"),
    ],
)
def test_beginnings(tmp_path, content, said):
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"x.gguf is not a readable GGUF file: {said}"):
        read(file)


def test_files_that_end_early(parts, tmp_path):
    """Wherever a file ends, the message is one of ours."""
    file = tmp_path / "x.gguf"
    whole = parts["llama"].write(file).read_bytes()
    for size in (5, 30, 200, 999, 4000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"it has \d+ bytes|it ends early|would end at byte"):
            read(file)


def test_what_is_right_stays_right(parts, tmp_path):
    file = tmp_path / "x.gguf"
    found = config(parts["llama"].write(file))
    assert (found.num_attention_heads, found.num_key_value_heads, found.rms_norm_eps) == (4, 2, pytest.approx(1e-4))
