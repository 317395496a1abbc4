"""The `distill` entry of a student's config.json: written, read and checked.

Every value that is read is checked for its type and range, so a damaged entry ends in one error message and not in a layout
that was never trained.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from students.config import Layout, Place, Shapes
from students.mixers import MIXERS, check_options
from students.mixers.mixer import Shape

FORMAT = 2
LAYERS, WIDTH, META, NUMBER = 1024, 2**20, 2**16, 2**31  # upper bounds of what is read; NUMBER: of every mixer option
WHERE = "config.json's `distill` entry"
DOCUMENTS = ("keywords", "positions")  # the values of `Place.documents`
_WHOLE = ("d_model", "n_heads", "n_kv_heads", "head_dim")


def to_dict(layout: Layout, place: Place, shapes: Shapes) -> dict:
    """The `distill` entry of config.json."""
    attention = {**asdict(shapes.shape), "exceptions": {str(layer): changes for layer, changes in shapes.exceptions.items()}}
    return {"format": FORMAT, "layout": asdict(layout), "place": asdict(place), "attention": attention}


def from_dict(entry: dict) -> tuple[Layout, Place, Shapes]:
    """The reverse of `to_dict`.

    Raises:
        ValueError: the entry has another format, or a value of a wrong type or out of its range.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{WHERE} is {_shown(entry)}; it should be a mapping of format, layout, place and attention")
    if entry.get("format") != FORMAT:
        raise ValueError(f"{WHERE} has format {_shown(entry.get('format'))}; this version reads {FORMAT}")
    layout = _layout(_mapping(entry, "layout"))
    layout.check()
    place = _mapping(entry, "place", Place)
    for name, value in place.items():
        if not isinstance(value, str) or not all(part.isidentifier() or part.isdigit() for part in value.split(".")):
            raise _wrong(f"place.{name}", value, "names joined by dots")
    if place.get("documents", "keywords") not in DOCUMENTS:
        raise _wrong("place.documents", place["documents"], f"one of {', '.join(DOCUMENTS)}")
    _check_teacher(entry.get("teacher", {}))
    attention = dict(_mapping(entry, "attention"))
    exceptions = attention.pop("exceptions", {})
    shape = _shape(attention, "attention", whole=True)
    if not isinstance(exceptions, dict):
        raise _wrong("attention.exceptions", exceptions, "a mapping of layers")
    found = {}
    for layer, changes in exceptions.items():
        if not layer.isdecimal() or int(layer) >= len(layout.pattern):
            raise _wrong("attention.exceptions", layer, f"a layer from 0 to {len(layout.pattern) - 1}")
        found[int(layer)] = _shape(changes, f"attention.exceptions.{layer}", whole=False)
    return layout, Place(**place), Shapes(Shape(**shape), found)


def _check_teacher(found: Any) -> None:
    """Refuse a `teacher` entry that is not a mapping of texts."""
    texts = found.values() if isinstance(found, dict) else [found]
    if not all(value is None or isinstance(value, str) for value in texts) or isinstance(found, str):
        raise _wrong("teacher", found, "a mapping of its reference and fingerprint, both text")


def _mapping(entry: Mapping[str, Any], key: str, kind: type | None = None) -> dict:
    found = entry.get(key)
    if not isinstance(found, dict):
        raise _wrong(key, found, "a mapping")
    if kind is not None:
        _check_names(found, key, {field.name for field in fields(kind)})
    return found


def _check_names(found: Mapping, key: str, known: set[str]) -> None:
    if unknown := sorted(set(found) - known):
        raise ValueError(f"{WHERE} has an unknown {key}.{unknown[0]}; known are {', '.join(sorted(known))}")


def _layout(entry: dict) -> Layout:
    """The layout, with its letters, mixers and options checked."""
    _check_names(entry, "layout", {field.name for field in fields(Layout)})
    pattern, mixers, meta = entry.get("pattern"), entry.get("mixers", {}), entry.get("meta_tokens", 0)
    if not isinstance(pattern, str) or not 1 <= len(pattern) <= LAYERS:
        raise _wrong("layout.pattern", pattern, f"a letter for each of 1 to {LAYERS:,} layers")
    if not _is_whole(meta, 0, META):
        raise _wrong("layout.meta_tokens", meta, f"a whole number from 0 to {META:,}")
    if not isinstance(mixers, dict) or not all(isinstance(options, dict) for options in mixers.values()):
        raise _wrong("layout.mixers", mixers, "a mapping of letters to a mixer's options")
    for letter, options in mixers.items():
        name = options.get("mixer")
        if not isinstance(name, str) or name not in MIXERS:
            raise _wrong(f"layout.mixers.{letter}.mixer", name, f"one of {', '.join(MIXERS)}")
        try:
            check_options(name, set(options) - {"mixer"})
        except ValueError as error:
            raise ValueError(f"{WHERE}: layout.mixers.{letter}: {error}") from error
        _check_numbers(options, f"layout.mixers.{letter}")
    return Layout(pattern, mixers, meta)


def _check_numbers(value: Any, where: str) -> None:
    """Refuse numbers in an option that are not finite or above NUMBER; the mixers check the rest."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers(inner, f"{where}.{name}")
    elif isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= NUMBER):
        raise _wrong(where, value, f"a number up to {NUMBER:,}")


def _shape(entry: Any, where: str, whole: bool) -> dict:
    """The fields of a `Shape`. whole: whether all fields without a default are required."""
    if not isinstance(entry, dict):
        raise _wrong(where, entry, "a mapping")
    _check_names(entry, where, {field.name for field in fields(Shape)})
    for name in _WHOLE:
        if (whole or name in entry) and not _is_whole(entry.get(name), 1, WIDTH):
            raise _wrong(f"{where}.{name}", entry.get(name), f"a whole number from 1 to {WIDTH:,}")
    for name, value in entry.items():
        if name in _WHOLE:
            continue
        if name in ("qkv_bias", "o_bias"):
            fits, wanted = isinstance(value, bool), "true or false"
        elif name in ("rope", "qk_norm"):
            fits, wanted = value is None or isinstance(value, str), "text or null"
        elif name == "window":
            fits, wanted = value is None or _is_whole(value, 1, NUMBER), f"null or a whole number from 1 to {NUMBER:,}"
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e12
            nullable = name in ("softmax_scale", "softcap")
            fits, wanted = number or (nullable and value is None), "a number from 0 to 1e12"
        if not fits:
            raise _wrong(f"{where}.{name}", value, wanted)
    return entry


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _wrong(key: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{WHERE}: {key} is {_shown(value)}; it should be {wanted}")


def _shown(value: Any) -> str:
    text = "a number of more than 30 digits" if isinstance(value, int) and abs(value) > 10**30 else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
