"""One token in place calls few operations of `kernels/`, and changes no more of a state than its own column."""

import importlib
from collections import Counter

import pytest
import torch

import students
from students.kernels.op import folders
from tests.students.test_decoding import CASES, new_cache, ordinary, student_of
from tests.students.test_model import text

OUTSIDE = Counter(token_linear=3)  # of each layer: out of the mixer, into the MLP and out of it
MIXERS = {  # what else a layer calls for one token; under a window's reference stands attention's
    "discrete": ("M", Counter(token_linear=1, ssm_token=1)),
    "stock": ("M", Counter(token_linear=1, ssm_token=1, gated_norm=1)),
    "windows": ("W", Counter(token_linear=1, window_token=1, attention_places=1)),
    "windowed": ("M", Counter(token_linear=1, ssm_token=1, window_token=1, attention_places=1)),
    "B'MOJO-F": ("B", Counter(token_linear=1, ssm_token=1, window_token=1, attention_places=1, gated_norm=1)),
    "gated deltanet": ("M", Counter(token_linear=1, delta_token=1)),
}
KEPT = Counter(token_linear=1, rotary_token=1, attention_places=1)


@pytest.fixture
def called(monkeypatch):
    """How often each op is picked, by the names in the logs."""
    counts = Counter()

    def counted(module):
        pick = module.pick

        def picked(op, *arguments, **options):
            counts[op] += 1
            return pick(op, *arguments, **options)

        monkeypatch.setattr(module, "pick", picked)

    for folder in folders():
        module = importlib.import_module(f"students.kernels.{folder}")
        if hasattr(module, "pick"):
            counted(module)
    return counts


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_ops_of_a_token(teacher, name, called):
    pattern = CASES[name][0]
    student, (letter, wanted) = student_of(teacher, *CASES[name]), MIXERS[name]
    ids, cache = text(1, 9), new_cache(student)
    ordinary(student, ids, None, cache)
    decode = students.Decoder(student, cache, 3)
    called.clear()
    decode._step()
    expected = Counter(token_linear=1)  # the head
    for layer in (pattern * 4)[:4]:
        expected += OUTSIDE + (wanted if layer == letter else KEPT)
    if name in ("windowed", "B'MOJO-F"):  # branch after branch, where the gate does not join them or they have one output
        expected["token_linear"] = called["token_linear"]
        assert called["token_linear"] <= 1 + 5 * 4
    assert called == expected


@torch.no_grad()
@pytest.mark.parametrize("name", ["windows", "windowed", "mixed", "stock"])
def test_a_token_writes_one_column(teacher, name):
    """Of every ring, at a place that moves by one and comes round; the rest stands where it stood."""
    student = student_of(teacher, *CASES[name])
    ids, cache = text(2, 9), new_cache(student)
    ordinary(student, ids, None, cache)
    decode = students.Decoder(student, cache, 12)
    rings = {
        (index, key): part
        for index, layer in enumerate(cache.layers)
        for key, part in (layer.tensors.items() if hasattr(layer, "tensors") else ())
        if key.rpartition(".")[2] in ("conv", "queue_x", "queue_B", "queue_log_a", "k", "v")
    }
    assert rings
    for at in range(9, 21):
        before = {key: part.clone() for key, part in rings.items()}
        decode(ids[:, at % 9 : at % 9 + 1])
        for key, part in rings.items():
            moved = (part != before[key]).flatten(2).any(2).any(0).nonzero()[:, 0].tolist()
            assert moved == [at % part.shape[1]], key
