"""A student's layers as a strip, one cell a layer, and what its letters mean."""

import html
from collections.abc import Mapping, Sequence

from distill.reports.page import note
from distill.yaml_file import dump

NEUTRAL = 6  # the palette's colour of the teacher's attention


def strip(pattern: str, mixers: Mapping[str, Mapping], kinds: Sequence[str], one_line: bool = False) -> str:
    """Cells with letters and layers' numbers.

    Args:
        kinds: every mixer's name there is on the page, in the order of its colours.
    """
    cells = []
    for layer, letter in enumerate(pattern):
        mixer = mixers[letter]["mixer"] if letter in mixers else "the teacher's attention"
        colour = kinds.index(mixer) % NEUTRAL if mixer in kinds else NEUTRAL
        title = html.escape(f"layer {layer}: {mixer}{_heads(mixers.get(letter, {}), layer)}", quote=True)
        cells.append(f"<span class='c{colour}' title='{title}'>{html.escape(letter)}<small>{layer}</small></span>")
    drawn = f"<div class='strip{' line' * one_line}'>{''.join(cells)}</div>"
    return f"<div class='scroll' tabindex='0'>{drawn}</div>" if one_line else drawn


def _heads(options: Mapping, layer: int) -> str:
    """The heads that stay attention in a layer that is split by heads."""
    keep = options.get("keep")
    if isinstance(keep, Mapping):
        keep = next((keep[key] for key in (layer, str(layer), "default") if key in keep), [])  # JSON's keys are strings
    return f", attention in heads {', '.join(map(str, keep))}" if keep else ""


def kinds_of(*mixers: Mapping[str, Mapping]) -> list[str]:
    """The names of mixers in some layouts, each once."""
    return list(dict.fromkeys(options["mixer"] for letters in mixers for options in letters.values()))


def meaning(pattern: str, mixers: Mapping[str, Mapping]) -> str:
    """What each letter stands for, and in how many layers."""
    lines = []
    for letter in dict.fromkeys(pattern):
        count = f"{letter}, {pattern.count(letter)} of {len(pattern)} layers"
        options = mixers.get(letter)
        said = (
            "the teacher's attention"
            if options is None
            else dump(dict(options), default_flow_style=True, width=1e9, sort_keys=True)
        )
        lines.append(note(f"{count}: {said.strip()}"))
    return "".join(lines)
