"""Recall as heat maps: needles by depth and length, and every family by length."""

from collections.abc import Mapping, Sequence

from distill.evaluation.recall.families import title as family_title
from distill.reports.svg import heat_map, short


def depth_maps(models: Mapping[str, Mapping], colours: Sequence[int]) -> list[str]:
    """A map of depth by length for every model and family that was measured depth by depth."""
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
    """A map of families, passkey among them, by length for every model; with a star those that selected the layout."""
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
    """Lengths as a chart writes them."""
    return [short(length) for length in lengths]


def _share(cells: Sequence[Mapping], length: int) -> float | None:
    """Answers that count over answers at a length, over all depths."""
    found = [cell for cell in cells if cell["length"] == length]
    return sum(cell["recalled"] for cell in found) / sum(cell["trials"] for cell in found) if found else None
