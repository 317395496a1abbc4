"""Layouts of every kind over four layers, and random tokens."""

import torch

WINDOW = {"size": 4, "sinks": 2}
SELECT = {"size": 6, "sinks": 0, "lag": False, "gate": "select"}
LAYOUTS = {
    "nothing swapped": ("AAAA", {}),
    "discrete": ("AMMM", {"M": {"mixer": "discrete_mamba2"}}),
    "stock": ("MAMA", {"M": {"mixer": "mamba2"}}),
    "windows": ("WAWW", {"W": {"mixer": "attention", "window": 4, "sinks": 2}}),
    "windowed": ("MAMM", {"M": {"mixer": "discrete_mamba2", "window": WINDOW | {"gate": True}}}),
    "Taipan": ("MMMS", {"M": {"mixer": "mamba2"}, "S": {"mixer": "mamba2", "window": SELECT}}),
    "B'MOJO-F": ("B", {"B": {"mixer": "mamba2", "window": {"size": 6, "sinks": 0}}}),
    "Samba": ("MW", {"M": {"mixer": "mamba2"}, "W": {"mixer": "attention", "window": 6}}),
    "parallel heads": (
        "PAFP",
        {"P": {"mixer": "parallel_heads", "window": 5, "sinks": 2}, "F": {"mixer": "parallel_heads"}},
    ),
    "shared keys": (
        "PSFT",
        {
            "P": {"mixer": "parallel_heads", "window": 5, "sinks": 2},
            "S": {"mixer": "parallel_heads", "window": 4, "sinks": 1, "share_kv": True},
            "F": {"mixer": "attention"},
            "T": {"mixer": "attention", "window": 6, "sinks": 3, "share_kv": True},
        },
    ),
    "all SSM": ("MMMM", {"M": {"mixer": "mamba2"}}),
    "shared": ("SSAS", {"S": {"mixer": "shared_attention", "blocks": 2, "rank": 4}}),
    "split heads": ("HAHH", {"H": {"mixer": "split_heads", "keep": {0: [0], "default": [1, 2]}, "window": 6}}),
    "mixed": (
        "MNWA",
        {"M": {"mixer": "mamba2", "window": WINDOW}, "N": {"mixer": "discrete_mamba2"}, "W": {"mixer": "attention"}},
    ),
}


def text(*shape):
    return torch.randint(1, 320, shape)
