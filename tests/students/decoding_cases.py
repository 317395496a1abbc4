"""Students and teachers to decode with, and the comparison of a `Decoder` with ordinary calls."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

import students
from distill.build import build
from students import mixers as table
from students.compat import CACHE
from students.config import Layout
from students.static_cache import StaticKeys
from tests.students.hymba import HYMBA
from tests.students.layouts import LAYOUTS
from tests.teachers.tiny import tiny_teacher

CASES = {name: (*layout, 0) for name, layout in LAYOUTS.items()} | {
    "hymba": ("FPSA", HYMBA, 5),
    "griffin": ("MMW", {"M": {"mixer": "rg_lru"}, "W": {"mixer": "attention", "window": 6, "sinks": 1}}, 0),
    "gated deltanet": ("MMMA", {"M": {"mixer": "gated_deltanet"}}, 0),
    "mamba": ("MMMW", {"M": {"mixer": "mamba1"}, "W": {"mixer": "attention", "window": 40}}, 0),
    "linear": ("GRLA", {"G": {"mixer": "gla"}, "R": {"mixer": "retention"}, "L": {"mixer": "longhorn"}}, 0),
    "kept and sinks": ("AAAW", {"W": {"mixer": "attention", "window": 4, "sinks": 3}}, 3),
}
COVERED = {options["mixer"] for _, mixers, _ in CASES.values() for options in mixers.values()}
CASES |= {name: ("MMMA", {"M": {"mixer": name}}, 0) for name in table.MIXERS if name not in COVERED}
FAMILIES = {  # attention on sliding windows, soft caps, positions that are learned or that name the documents
    "mistral-7b-v0.1": "MA",
    "gemma-2-2b": "AMAW",
    "gemma-3-270m": "AMAW",
    "gpt2": "WA",
    "pythia-160m": "MA",
    "stablelm-2-1_6b": "MA",
    "falcon-7b": "MA",
}
MIXERS = {"M": {"mixer": "mamba2"}, "W": {"mixer": "attention", "window": 5, "sinks": 2}}
PROMPTS = ((1, 14), (2, 3))  # rows and tokens: windows that are full, and such that become so; the second is padded
STEPS = 8
every_case = pytest.mark.parametrize("case", CASES)


def stirred(student):
    """Its mixers at no special values, and its meta tokens so that they matter."""
    with torch.no_grad():
        for mixer in student.mixers.values():
            mixer.rescale(torch.full((len(mixer.out_weight()[0]),), 0.05))
            for parameter in mixer.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        if student.meta_tokens is not None:
            student.meta_tokens.weight += 0.3 * torch.randn_like(student.meta_tokens.weight)
    return student


def student_of(teacher, pattern, mixers, meta_tokens=0):
    used = {letter: options for letter, options in mixers.items() if letter in pattern}
    return stirred(build(teacher, Layout.over(teacher.n_layers, pattern, used, meta_tokens))[0])


def family_models(name):
    """A tiny model of a family and a student of it."""
    teacher = tiny_teacher(name, num_hidden_layers=len(FAMILIES[name]))
    return teacher.model, student_of(teacher, FAMILIES[name], MIXERS)


def padded(rows, length):
    """A mask whose first row begins with padding, or none."""
    if rows == 1:
        return None
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    return mask


def ordinary(model, ids, mask, cache):
    """Logits of calls as `generate` makes them: those behind the prompt, or behind one token on a cache that has begun."""
    length = ids.shape[1]
    begun = cache.get_seq_length()
    where = {}
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, length + begun - mask.shape[1]), value=1)
        where = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, begun:]}
    return model(input_ids=ids, use_cache=True, **{CACHE: cache}, **where).logits[:, -1]


def new_cache(model):
    return model.new_cache() if hasattr(model, "new_cache") else DynamicCache(config=model.config)


@torch.no_grad()
def check(model, ids, prompt, tolerance, **options):
    """A decoder beside ordinary calls, and the cache that it gives back."""
    mask, caches, end = padded(len(ids), prompt), [new_cache(model) for _ in range(2)], ids.shape[1] - 5
    mask = None if mask is None else mask.to(ids.device)
    for cache in caches:
        ordinary(model, ids[:, :prompt], mask, cache)
    decode = students.Decoder(model, caches[1], end - prompt + 1, mask, **options)
    places = addresses(caches[1])
    for at in range(prompt, end):
        token = ids[:, at : at + 1]
        near(decode(token.clone()), ordinary(model, token, mask, caches[0]), tolerance)
        assert addresses(caches[1]) == places
        assert caches[1].get_seq_length() == at + 1
    decode.release()
    assert not any(isinstance(layer, StaticKeys) for layer in caches[1].layers)
    for layer, wanted in zip(caches[1].layers, caches[0].layers, strict=True):
        assert type(layer) is type(wanted) and layer.get_seq_length() == wanted.get_seq_length()
        for name, tensor in tensors(wanted).items():
            assert tensor.shape == tensors(layer)[name].shape, name
    for at in range(end, end + 3):
        near(*(ordinary(model, ids[:, at : at + 1], mask, cache) for cache in caches), tolerance)
    near(*(ordinary(model, ids[:, -2:], mask, cache) for cache in caches), tolerance)


def near(found, wanted, tolerance):
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < tolerance, f"{error:.1e}"


def tensors(layer):
    return layer.tensors if hasattr(layer, "tensors") else {"keys": layer.keys, "values": layer.values}


def addresses(cache):
    return [(name, part.data_ptr(), part.shape) for layer in cache.layers for name, part in sorted(tensors(layer).items())]


def filled(model, ids, cache, attention=None):
    """A cache with a prompt."""
    wanted = model.config._attn_implementation
    model.config._attn_implementation = attention or wanted
    model(input_ids=ids, use_cache=True, **{CACHE: cache})
    model.config._attn_implementation = wanted
    return cache
