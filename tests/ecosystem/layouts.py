"""Layouts that other people's wrappers are tried on: every mixer of the table, windows, all that is composed."""

import torch

from distill.build import build
from students.config import Layout
from students.mixers import MIXERS, has_own_window

WINDOW = {"size": 5, "sinks": 2}
LAYOUTS = {name: ("M", {"M": {"mixer": name}}, 0) for name in MIXERS}
LAYOUTS |= {
    f"{name} behind windows": ("MA", {"M": {"mixer": name, "window": WINDOW | {"gate": True}}}, 0)
    for name in MIXERS
    if not has_own_window(name)
}
LAYOUTS |= {
    f"{name} lending": ("M", {"M": {"mixer": name, "window": WINDOW | {"own": False, "lag": lag}}}, 0)
    for name, lag in (("mamba2", True), ("discrete_mamba2", False))
}
LAYOUTS |= {
    "nothing swapped": ("A", {}, 0),
    "windows": ("WA", {"W": {"mixer": "attention", "window": 5, "sinks": 2}}, 0),
    "Taipan": ("MS", {"M": {"mixer": "mamba2"}, "S": {"mixer": "mamba2", "window": WINDOW | {"gate": "select"}}}, 0),
    "one head a group": ("M", {"M": {"mixer": "mamba2", "expand": 1, "n_groups": 2}}, 0),
    "Jamba's norms": ("MA", {"M": {"mixer": "mamba1", "norms": True}}, 0),
    "two blocks that layers share": ("S", {"S": {"mixer": "shared_attention", "blocks": 2, "rank": 3}}, 0),
    "split heads": ("H", {"H": {"mixer": "split_heads", "keep": {"1": [0], "default": [2, 3]}}}, 0),
    "split heads behind windows": (
        "HA",
        {"H": {"mixer": "split_heads", "keep": [1], "ssm": {"mixer": "discrete_mamba2", "window": WINDOW}}},
        0,
    ),
    "Hymba": (
        "PSFT",
        {
            "P": {"mixer": "parallel_heads", "window": 6, "sinks": 3, "ssm": {"mixer": "mamba2"}},
            "S": {"mixer": "parallel_heads", "window": 5, "sinks": 3, "share_kv": True},
            "F": {"mixer": "attention"},
            "T": {"mixer": "attention", "window": 6, "sinks": 3, "share_kv": True},
        },
        3,
    ),
    "meta tokens": ("MA", {"M": {"mixer": "mamba2"}}, 2),
}
SHARING = [name for name, (_, mixers, _) in LAYOUTS.items() if any("share_kv" in options for options in mixers.values())]


def student_of(teacher, name, scale=0.3):
    """A student of that layout, stirred so that no parameter stays at a special value, its memory its own."""
    pattern, mixers, meta_tokens = LAYOUTS[name]
    student, _ = build(teacher, Layout.over(4, pattern, mixers, meta_tokens))
    with torch.no_grad():
        for mixer in student.mixers.values():
            mixer.rescale(torch.full((len(mixer.out_weight()[0]),), scale))
        for parameter in student.parameters():
            parameter.data = parameter.data.clone()
        student.tie_weights()
        for mixer in student.mixers.values():
            for parameter in mixer.parameters():
                parameter += 0.03 * torch.randn_like(parameter)
    return student


def linear_layers(student):
    """Every linear layer but the head, by name."""
    head = student.get_output_embeddings()
    found = {name: module for name, module in student.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: module for name, module in found.items() if module is not head}
