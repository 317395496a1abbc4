"""Heat maps of recall: needles by depth and length, and every family of tests by length."""

from collections.abc import Mapping, Sequence

from distill.evaluation.recall.families import title as family_title
from distill.reports.svg import heat_map, short


def depth_maps(models: Mapping[str, Mapping], colours: Sequence[int]) -> list[str]:
    """Heat maps of depth by length, one for each model and each family that was measured by depth."""
    maps = []
    for colour, (name, results) in zip(colours, models.items(), strict=True):
        for family, cells in results.get("recall", {}).items():
            if cells and "depth" in cells[0]:
                found = {(cell["depth"], cell["length"]): cell["score"] for cell in cells}
                depths, lengths = sorted({key[0] for key in found}), sorted({key[1] for key in found})
                rows = [[found.get((depth, length)) for length in lengths] for depth in depths]
                title = f"{name}: {family_title(family)} recalled, %, depth by length"
                maps.append(heat_map(title, [f"{depth:.0%}" for depth in depths], names(lengths), rows, colour))
    return maps


def family_maps(models: Mapping[str, Mapping], colours: Sequence[int], selected: Sequence[str] = ()) -> list[str]:
    """Heat maps of families, including passkey, by length, one for each model. A star marks families that selected the
    layout."""
    maps = []
    for colour, (name, results) in zip(colours, models.items(), strict=True):
        families = {"passkey": results.get("passkey", []), **results.get("recall", {})}
        lengths = sorted({cell["length"] for cells in families.values() for cell in cells})
        if lengths:
            rows = {family: [_share(cells, length) for length in lengths] for family, cells in families.items() if cells}
            labels = [family_title(family) + "*" * (family in selected) for family in rows]
            maps.append(heat_map(f"{name}: answers recalled, %", labels, names(lengths), list(rows.values()), colour))
    return maps


def names(lengths: Sequence[int]) -> list[str]:
    """Lengths as labels of a chart."""
    return [short(length) for length in lengths]


def _share(cells: Sequence[Mapping], length: int) -> float | None:
    """The share of correct answers at a length, over all depths; None if it was not measured."""
    found = [cell for cell in cells if cell["length"] == length]
    return sum(cell["recalled"] for cell in found) / sum(cell["trials"] for cell in found) if found else None
