"""The baselines of a student: the same model without training, with sliding windows and sinks in place of its mixers.

An untrained window of 64 tokens and 4 sinks keeps most of what averages measure (arXiv 2608.28444). A student with a window
branch owes a gain to its SSM only as far as it beats the same windows trained alone: the window-only control (twin).
"""

import itertools
from typing import cast

from students.config import KEEP, Layout
from students.mixers import has_own_window, mixer_class

WINDOW, SINKS = 64, 4
UNTRAINED = {"mixer": "attention", "window": WINDOW, "sinks": SINKS}


def window_everywhere(layout: Layout) -> Layout:
    """Return a layout with the window in every layer."""
    return Layout("W" * len(layout.pattern), {"W": UNTRAINED})


def window_layout(layout: Layout) -> Layout:
    """Return the student's own layout, with each mixer that is not attention replaced by the window."""
    return Layout(layout.pattern, {letter: _or_attention(options, UNTRAINED) for letter, options in layout.mixers.items()})


def twin_layout(layout: Layout) -> Layout:
    """Return the student's own layout, with each mixer replaced by its own window branch (64 + 4 if it has none)."""
    return Layout(layout.pattern, {letter: _window_of(options) for letter, options in layout.mixers.items()})


def uniform_window(layout: Layout) -> Layout | None:
    """Return a layout with as many full attention layers as the student keeps, evenly spread, and windows elsewhere.

    None if the student's own layout is already as even, so that the baseline would be the same again, or keeps no attention.
    """
    kept, depth = attention_layers(layout), len(layout.pattern)
    if not kept or all(depth // len(kept) <= b - a <= -(-depth // len(kept)) for a, b in itertools.pairwise(kept)):
        return None
    even = {index * depth // len(kept) for index in range(len(kept))}
    pattern = "".join(KEEP if layer in even else "W" for layer in range(depth))
    return Layout(pattern, {"W": UNTRAINED} if "W" in pattern else {})


def attention_layers(layout: Layout) -> list[int]:
    """Return the layers with full attention: the teacher's own, or a mixer that is attention without a window."""
    return [layer for layer, letter in enumerate(layout.pattern) if _is_whole(layout.mixers.get(letter))]


def has_window_branch(layout: Layout) -> bool:
    """Whether some mixer has an attention branch and a state, so that a twin makes sense."""
    return any(_attention_of(options) and not _is_attention(options) for options in layout.mixers.values())


def _is_whole(options: dict | None) -> bool:
    return options is None or (_is_attention(options) and not options.get("window"))


def _or_attention(options: dict, window: dict) -> dict:
    return cast(dict, _attention_of(options)) if _is_attention(options) else window


def _is_attention(options: dict) -> bool:
    """Whether a mixer is attention and nothing else."""
    return mixer_class(options["mixer"]).only_attention


def _window_of(options: dict) -> dict:
    return _attention_of(options) or UNTRAINED


def _attention_of(options: dict) -> dict | None:
    """Return a mixer's attention as a mixer of its own: its window branch, or its attention heads; None if it has none."""
    window = options.get("window")
    if isinstance(window, dict):
        return {"mixer": "attention", "window": window["size"], "sinks": window.get("sinks", SINKS)}
    if not has_own_window(options["mixer"]):
        return None
    return {"mixer": "attention", **{name: options[name] for name in ("window", "sinks", "rope") if name in options}}
