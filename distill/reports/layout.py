"""A student's layout as a strip with one cell for each layer, and the meaning of its letters."""

import html
from collections.abc import Mapping, Sequence

from distill.reports.page import note
from distill.yaml_file import dump

NEUTRAL = 6  # the palette's colour of the teacher's attention


def strip(pattern: str, mixers: Mapping[str, Mapping], kinds: Sequence[str], one_line: bool = False) -> str:
    """The HTML strip of a layout: cells with letters and layer numbers.

    Args:
        kinds: the names of all mixers on the page, in the order of their colours.
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
    """The heads that keep attention in a layer that is split by heads."""
    keep = options.get("keep")
    if isinstance(keep, Mapping):
        keep = next((keep[key] for key in (layer, str(layer), "default") if key in keep), [])  # JSON's keys are strings
    return f", attention in heads {', '.join(map(str, keep))}" if keep else ""


def kinds_of(*mixers: Mapping[str, Mapping]) -> list[str]:
    """The names of the mixers of some layouts, without repeats."""
    return list(dict.fromkeys(options["mixer"] for letters in mixers for options in letters.values()))


def meaning(pattern: str, mixers: Mapping[str, Mapping]) -> str:
    """The mixer of each letter, and its number of layers, as HTML."""
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
