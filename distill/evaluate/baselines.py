"""What a student must beat: the same model without any training, its mixers replaced by a sliding window with sinks.

A window of 64 and 4 sinks, without a step of training, keeps most of what averages measure (arXiv 2608.28444). And what a
student with a window branch gains, it owes to its SSM only as far as it beats the same windows trained alone, its twin.
"""

from students.config import Layout
from students.mixers import has_own_window

WINDOW, SINKS = 64, 4


def window_everywhere(layout: Layout) -> Layout:
    """Every layer a window."""
    return Layout("W" * len(layout.pattern), {"W": {"mixer": "attention", "window": WINDOW, "sinks": SINKS}})


def window_layout(layout: Layout) -> Layout:
    """The student's own layout, each mixer replaced by its window (64 + 4 where it has none). Trained, it is the twin."""
    return Layout(layout.pattern, {letter: _window_of(options) for letter, options in layout.mixers.items()})


def has_window_branch(layout: Layout) -> bool:
    """Whether some mixer stands beside attention, so that a twin makes sense."""
    return any(options["mixer"] != "attention" and _attention_of(options) for options in layout.mixers.values())


def _window_of(options: dict) -> dict:
    return _attention_of(options) or {"mixer": "attention", "window": WINDOW, "sinks": SINKS}


def _attention_of(options: dict) -> dict | None:
    """The attention in a mixer, as a mixer of its own."""
    window = options.get("window")
    if isinstance(window, dict):
        return {"mixer": "attention", "window": window["size"], "sinks": window.get("sinks", SINKS)}
    if not has_own_window(options["mixer"]):
        return None
    return {"mixer": "attention", **{name: options[name] for name in ("window", "sinks", "rope") if name in options}}
