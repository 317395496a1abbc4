"""The bytes of a cache: what is worked out from shapes is what a real one holds, and what the layouts promise."""

import pytest
import torch

from distill.build import build, empty
from students.config import Layout
from students.state_size import cache_bytes, state_bytes
from tests.students.layouts import LAYOUTS, text
from tests.teachers.tiny import tiny_teacher

META = 5


def real_bytes(student, length):
    """What the cache of a run over so many tokens holds for each of two rows."""
    cache = student.new_cache()
    for start in range(0, length, 512):
        ids = text(2, min(512, length - start)) % student.config.vocab_size
        student(ids, past_key_values=cache, logits_to_keep=1)
    total = sum(cache_bytes(layer) for layer in cache.layers)
    assert total % 2 == 0
    return total // 2


@pytest.mark.parametrize(
    ("layout", "dtype", "meta"),
    [
        *((layout, torch.float32, META) for layout in LAYOUTS),
        ("mixed", torch.bfloat16, 0),
        ("shared keys", torch.bfloat16, 0),
    ],
)
def test_it_is_what_a_real_cache_holds(teacher, layout, dtype, meta):
    """A short text, in which windows are not full, and one beyond, on the line."""
    student, _ = build(teacher, Layout.over(4, *LAYOUTS[layout], meta))
    student.to(dtype)
    for length in (4, 60):
        assert state_bytes(student, length, dtype) == real_bytes(student, length)


def test_1k_and_4k_tokens(teacher):
    student, _ = build(teacher, Layout("MPSA", _hymba(64)))
    for length in (1024, 4096):
        assert state_bytes(student, length, torch.float32) == real_bytes(student, length)


def _hymba(window):
    heads = {"mixer": "parallel_heads", "window": window, "sinks": 4, "ssm": {"mixer": "discrete_mamba2", "d_state": 16}}
    return {"P": heads, "S": {**heads, "share_kv": True}, "M": {"mixer": "mamba2"}}


def test_sliding_windows_of_kept_attention():
    teacher = tiny_teacher("gemma-3-270m")
    student, _ = build(teacher, Layout("AM", {"M": {"mixer": "attention"}}))
    for length in (4, 40):
        assert state_bytes(student, length, torch.float32) == real_bytes(student, length)


@pytest.mark.parametrize("tokens", [1_000, 32_000, 256_000])
def test_what_layouts_promise(teacher, tokens):
    """By arithmetic, in bfloat16: full attention grows, an SSM does not, windows stop, sharing halves."""
    heads, keys, width = 4, 2, 8
    token = 2 * keys * width * 2  # k and v of a kept layer
    placed = token + 2 * 8  # an attention mixer also keeps each token's document and position
    state = 4 * heads * width * 16 + 3 * (heads * width + 2 * heads * 16) * 2  # float32, and the convolution's tail
    window = (64 + 4) * placed

    def of(pattern, mixers, meta=0):
        return state_bytes(empty(teacher, Layout(pattern, mixers, meta)), tokens)

    ssm = {"mixer": "discrete_mamba2", "d_state": 16}
    assert of("AAAA", {}) == 4 * token * tokens
    assert of("WAAW", {"W": {"mixer": "attention"}}) == 2 * (token + placed) * tokens
    assert of("MMMM", {"M": ssm}) == 4 * state
    assert of("AMMM", {"M": ssm}) == token * tokens + 3 * state
    assert of("PPPP", _only("P")) == 4 * (state + window)
    assert of("PSPS", _only("P", "S"), meta=128) == 4 * state + 2 * window
    assert of("APSA", _only("P", "S"), meta=128) == 2 * token * (tokens + 128) + 2 * state + window


def _only(*letters):
    return {letter: options for letter, options in _hymba(64).items() if letter in letters}
