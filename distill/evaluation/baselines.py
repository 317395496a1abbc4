"""What a student must beat: the same model without any training, its mixers replaced by a sliding window with sinks.

A window of 64 and 4 sinks, without a step of training, keeps most of what averages measure (arXiv 2608.28444). And what a
student with a window branch gains, it owes to its SSM only as far as it beats the same windows trained alone, its twin.
"""

import itertools
from typing import cast

from students.config import KEEP, Layout
from students.mixers import has_own_window, mixer_class

WINDOW, SINKS = 64, 4
UNTRAINED = {"mixer": "attention", "window": WINDOW, "sinks": SINKS}


def window_everywhere(layout: Layout) -> Layout:
    """Every layer a window."""
    return Layout("W" * len(layout.pattern), {"W": UNTRAINED})


def window_layout(layout: Layout) -> Layout:
    """The student's own layout, each mixer that is no attention replaced by the window."""
    return Layout(layout.pattern, {letter: _or_attention(options, UNTRAINED) for letter, options in layout.mixers.items()})


def twin_layout(layout: Layout) -> Layout:
    """The student's own layout, each mixer replaced by its own window branch (64 + 4 where it has none)."""
    return Layout(layout.pattern, {letter: _window_of(options) for letter, options in layout.mixers.items()})


def uniform_window(layout: Layout) -> Layout | None:
    """As many whole attention layers as the student keeps, evenly spread, and the window in every other layer.

    None where the student's own layout is as even already, so that it would be the same baseline again, or keeps none.
    """
    kept, depth = attention_layers(layout), len(layout.pattern)
    if not kept or all(depth // len(kept) <= b - a <= -(-depth // len(kept)) for a, b in itertools.pairwise(kept)):
        return None
    even = {index * depth // len(kept) for index in range(len(kept))}
    pattern = "".join(KEEP if layer in even else "W" for layer in range(depth))
    return Layout(pattern, {"W": UNTRAINED} if "W" in pattern else {})


def attention_layers(layout: Layout) -> list[int]:
    """The layers with whole attention: the teacher's own, or a mixer that is attention without a window."""
    return [layer for layer, letter in enumerate(layout.pattern) if _is_whole(layout.mixers.get(letter))]


def has_window_branch(layout: Layout) -> bool:
    """Whether some mixer stands beside attention, so that a twin makes sense."""
    return any(_attention_of(options) and not _is_attention(options) for options in layout.mixers.values())


def _is_whole(options: dict | None) -> bool:
    return options is None or (_is_attention(options) and not options.get("window"))


def _or_attention(options: dict, window: dict) -> dict:
    return cast(dict, _attention_of(options)) if _is_attention(options) else window


def _is_attention(options: dict) -> bool:
    """Whether a mixer is attention and nothing beside it."""
    return mixer_class(options["mixer"]).only_attention


def _window_of(options: dict) -> dict:
    return _attention_of(options) or UNTRAINED


def _attention_of(options: dict) -> dict | None:
    """The attention in a mixer, as a mixer of its own: a window branch, or that of a mixer with attention heads."""
    window = options.get("window")
    if isinstance(window, dict):
        return {"mixer": "attention", "window": window["size"], "sinks": window.get("sinks", SINKS)}
    if not has_own_window(options["mixer"]):
        return None
    return {"mixer": "attention", **{name: options[name] for name in ("window", "sinks", "rope") if name in options}}
