"""Mixers of every kind with their options, made from random attention, and the contexts of their calls."""

import itertools
from dataclasses import replace

import pytest
import torch

from students.mixers import MIXERS, has_own_window, make_mixer, mixer_class, mixer_options
from students.mixers.mixer import Context, Shape
from students.mixers.transfer import Projections
from tests.conftest import TOLERANCE

SHAPE = Shape(d_model=24, n_heads=4, n_kv_heads=2, head_dim=8)
BIASED = replace(SHAPE, qkv_bias=True, o_bias=True)
TIME = 70
WINDOW = {"size": 7, "sinks": 2}

# Every mixer of the table appears as it is, and every SSM with a window; here is what to try beyond that.
FURTHER = {
    "attention": [{"window": 7, "sinks": 2}, {"window": 5}, {"rope": False}],
    "discrete_mamba2": [{"rope": True, "norm": True}, {"d_state": 4}, {"d_state": 16, "d_conv": 2}, {"lag": 3}],
    "mamba1": [{"n_groups": 2, "d_state": 5, "dt_rank": 3}, {"n_groups": 4, "d_state": 12, "d_conv": 3}, {"norms": True}],
    "mamba2": [{"expand": 1}, {"n_groups": 2}, {"n_groups": 1, "d_state": 4}, {"lag": 3}],
    "rg_lru": [{"d_conv": 2}],
    "gated_deltanet": [{"d_conv": 2}],
    "gla": [{"gate_rank": 20}],
    "longhorn": [{"d_state": 4, "beta_rank": 20}, {"d_conv": 2}],
    "retention": [{"decay": "lightning"}, {"rope": False}],
    "shared_attention": [{"rank": 0}, {"rank": 3, "start": "central", "window": 7, "sinks": 2}],
    "split_heads": [
        {"keep": [0, 3]},
        {"keep": [1, 2, 0], "window": 7, "sinks": 2},
        {"keep": [2, 3], "ssm": {"mixer": "mamba2"}},
        {"keep": [1], "ssm": {"mixer": "discrete_mamba2", "window": {**WINDOW, "gate": True}}},
    ],
    "parallel_heads": [
        {"window": 7, "sinks": 2, "ssm": {"mixer": "discrete_mamba2", "d_state": 4, "norm": True}},
        {"window": 6, "ssm": {"mixer": "discrete_mamba2", "lag": 6, "rope": True}, "norm": False},
        {"ssm": {"mixer": "mamba2", "expand": 1}},
        {"window": 7, "sinks": 2, "ssm": {"mixer": "mamba2", "n_groups": 1, "d_state": 4}},
    ],
}
WINDOWS = [{**WINDOW, "own": own, "lag": lag, "gate": gate} for own, lag, gate in itertools.product((True, False), repeat=3)]
WINDOWS += [{**WINDOW, "own": True, "lag": False, "gate": "select"}]
VARIANTS = [(name, {}) for name in MIXERS]
VARIANTS += [(name, options) for name, further in FURTHER.items() for options in further]
VARIANTS += [
    (name, {"window": window})
    for name in MIXERS
    if not has_own_window(name)
    for window in WINDOWS
    if (window["own"] or mixer_class(name).lends) and (not window["lag"] or "lag" in mixer_options(name))
]
# Every mixer as it is, and of its options a sample (all with -m matrix).
every_mixer = pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(name, options, marks=[pytest.mark.matrix] if options else []) for name, options in VARIANTS],
    ids=lambda value: str(value).replace("'", ""),
)


def attention_tensors(shape, dtype=torch.float64):
    h, kv, p, d = shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.d_model
    sizes = {"q": (h, p, d), "k": (kv, p, d), "v": (kv, p, d), "o": (h, d, p)}
    tensors = {name: torch.randn(*size, dtype=dtype) * 0.3 for name, size in sizes.items()}
    if shape.qkv_bias:
        tensors |= {f"{name}_bias": torch.randn(*sizes[name][:2], dtype=dtype) for name in "qkv"}
    if shape.o_bias:
        tensors["o_bias"] = torch.randn(d, dtype=dtype)
    return tensors


def made(name, options, shape=SHAPE, dtype=torch.float64, stir=True):
    """A mixer made from random attention, calibrated, and stirred so that nothing stays at a special value."""
    mixer = make_mixer(name, shape, options).to(dtype)
    transfer = mixer.from_attention(Projections(**attention_tensors(shape, dtype)))
    h = torch.randn(2, TIME, shape.d_model, dtype=dtype)
    mixer.calibrate(h, transfer)
    if stir:
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter += 0.03 * torch.randn_like(parameter)
    return mixer, h, transfer


def rope_tables(time, width=SHAPE.head_dim, dtype=torch.float64, batch=2):
    angles = torch.arange(time, dtype=dtype)[:, None] / 100.0 ** (torch.arange(0, width, 2, dtype=dtype) / width)
    angles = torch.cat([angles, angles], -1).expand(batch, -1, -1)
    return angles.cos(), angles.sin()


def packed():
    documents = torch.zeros(2, TIME, dtype=torch.long)
    documents[0, 30:], documents[0, 33:], documents[1, 55:] = 1, 2, 1
    return documents


def left_padded():
    documents = torch.zeros(2, TIME, dtype=torch.long)
    documents[0, :11] = -1
    return documents


def context(documents=None, state=None, start=0, stop=TIME):
    tables = tuple(table[:, start:stop] for table in rope_tables(TIME))
    return Context(None if documents is None else documents[:, start:stop], tables, state)


def close(a, b, tolerance=TOLERANCE[torch.float64]):
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1.0)
