"""SVG charts for a page, in the page's colours, including dark mode.

All are 360 units wide, so that their text is readable on a phone. Colours are numbers of the page's palette, 0 to 6.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PALETTE = 7
WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 24, 8, 34  # margins for the axes
POINTS = 240  # the most points of a line; more are not visible


@dataclass(frozen=True)
class Series:
    """One line of a chart. Points that are not finite are left out, and on a logarithmic axis also those not positive."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False
    faint: bool = False
    marks: bool = False


class Axis:
    """One axis: the places of values, and the ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool = False, zero: bool = False) -> None:
        """start, end: the places of the smallest and the largest value. zero: the axis begins at 0."""
        self.log, self.start, self.end = log, start, end
        low, high = min(values), max(values)
        low = 0.0 if zero else low
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high = low, high

    def place(self, value: float) -> float:
        """The place of a value."""
        a, b, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (v - a) / (b - a) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values in the axis's range."""
        if self.log:
            tens = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1,), (1, 2, 5)):
                found = [f * 10.0**ten for ten in tens for f in factors if self.low <= f * 10.0**ten <= self.high]
                if len(found) > 1:
                    return found[:: -(-len(found) // 6)]
        rough = (self.high - self.low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(f * unit for f in (1, 2, 5, 10) if f * unit >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
    ticks: Mapping[float, str] | None = None,
    band: bool = False,
) -> str:
    """A line chart. zero: the y axis begins at 0. ticks: labels by x. band: a tinted background."""
    drawn = [(one, _points(one, log_x, log_y)) for one in series]
    every = [point for _, points in drawn for point in points]
    if not every:
        return _figure(title, _text(WIDTH / 2, HEIGHT / 2, "no finite values", "middle"), HEIGHT)
    across = Axis([x for x, _ in every], LEFT, WIDTH - RIGHT, log_x)
    up = Axis([y for _, y in every], HEIGHT - BOTTOM, TOP, log_y, zero)
    parts = [
        f"<rect class='band' x='{LEFT}' y='{TOP}' width='{WIDTH - LEFT - RIGHT}' height='{HEIGHT - TOP - BOTTOM}'/>"
    ] * band
    for value in up.ticks():
        y = up.place(value)
        parts.append(f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(_text(LEFT - 5, y + 4, short(value), "end"))
    labels = ticks if ticks is not None else {value: short(value) for value in across.ticks()}
    parts += [_text(across.place(x), HEIGHT - BOTTOM + 14, label, "middle") for x, label in thinned(labels).items()]
    parts += [_drawn(one, [(across.place(x), up.place(y)) for x, y in points]) for one, points in drawn if points]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label, "middle"))
    upright = f"translate(11 {(HEIGHT - BOTTOM + TOP) / 2:.0f}) rotate(-90)"
    parts.append(f"<text transform='{upright}' text-anchor='middle'>{html.escape(y_label)}</text>")
    return _figure(title, "".join(parts), HEIGHT, _legend(series))


def intervals(title: str, rows: Sequence[tuple[str, float, float, int]], x_label: str) -> str:
    """A chart with one point and error bar for each row: label, value, half the length of the bar, colour."""
    line, height = 34, 34 * len(rows) + BOTTOM
    axis = Axis([end for _, value, error, _ in rows for end in (value - error, value + error)] + [0.0], 8, WIDTH - 52)
    parts = []
    for value in axis.ticks():
        x = axis.place(value)
        parts.append(f"<line class='grid' x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='{height - BOTTOM + 4}'/>")
        parts.append(_text(x, height - BOTTOM + 16, short(value), "middle"))
    for index, (label, value, error, colour) in enumerate(rows):
        y = index * line + 26
        a, x, b = (axis.place(place) for place in (value - error, value, value + error))
        parts.append(_text(8, y - 9, label, "start", "value"))
        bar = f"<line stroke='currentColor' stroke-width='2' x1='{a:.1f}' x2='{b:.1f}' y1='{y}' y2='{y}'/>"
        point = f"<circle fill='currentColor' r='4' cx='{x:.1f}' cy='{y}'/>"
        parts.append(f"<g class='c{colour % PALETTE}'>{bar}{point}</g>")
        parts.append(_text(min(b + 8, WIDTH - 44), y + 4, f"{value:.3f}", "start"))
    parts.append(_text(WIDTH / 2, height - 3, x_label, "middle"))
    return _figure(title, "".join(parts), height)


def heat_map(
    title: str, rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[float | None]], colour: int = 0
) -> str:
    """A heat map of shares between 0 and 1, each written into its cell as a percentage; None is left empty."""
    left, line = 64, 26
    width, height = (WIDTH - left) / len(columns), line * len(rows) + 20
    parts = []
    for r, (row, values) in enumerate(zip(rows, cells, strict=True)):
        parts.append(_text(left - 5, r * line + 17, row, "end"))
        for c, value in enumerate(values):
            x, y = left + c * width, r * line
            shade = 0.0 if value is None else 0.85 * value
            parts.append(
                f"<rect class='c{colour % PALETTE}' x='{x:.1f}' y='{y}' width='{width - 2:.1f}' height='{line - 2}' rx='2' "
                f"fill='currentColor' fill-opacity='{shade:.2f}' stroke='currentColor' stroke-opacity='.3'/>"
            )
            if value is not None:
                parts.append(_text(x + width / 2 - 1, y + 16, f"{100 * value:.0f}", "middle", "value"))
    parts += [_text(left + (c + 0.5) * width, height - 5, name, "middle") for c, name in enumerate(columns)]
    return _figure(title, "".join(parts), height)


def short(value: float) -> str:
    """Format a number in few characters; multiples of 1024 are written with k."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}k"
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.3g}"


def thinned(labels: Mapping[float, str], most: int = 9) -> dict[float, str]:
    """At most `most` of the labels, evenly spaced."""
    items = list(labels.items())
    return dict(items[:: -(-len(items) // most)]) if items else {}


def averaged(values: Sequence[float], count: int = POINTS) -> list[float]:
    """The means of at most `count` groups of neighbouring values; the values themselves if there are fewer."""
    size = -(-len(values) // count)
    groups = [values[start : start + size] for start in range(0, len(values), max(size, 1))]
    return [sum(group) / len(group) for group in groups]


def _points(one: Series, log_x: bool, log_y: bool) -> list[tuple[float, float]]:
    pairs = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return [(x, y) for x, y in pairs if (x > 0 or not log_x) and (y > 0 or not log_y)]


def _drawn(one: Series, places: Sequence[tuple[float, float]]) -> str:
    """A line of at most POINTS points, and its marks."""
    xs, ys = averaged([x for x, _ in places]), averaged([y for _, y in places])
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    dash = " stroke-dasharray='5 4'" if one.dashed else ""
    width, opacity = (1, ".35") if one.faint else (2, "1")
    marks = "".join(f"<circle fill='currentColor' r='3' cx='{x:.1f}' cy='{y:.1f}'/>" for x, y in places) if one.marks else ""
    return (
        f"<g class='c{one.colour % PALETTE}'><polyline fill='none' stroke='currentColor' stroke-width='{width}' "
        f"stroke-opacity='{opacity}'{dash} points='{path}'/>{marks}</g>"
    )


def _legend(series: Sequence[Series]) -> str:
    """The names of the lines with their colours; empty for one line."""
    named = {one.name: one for one in series if one.name and not one.faint}
    if len(named) < 2:
        return ""
    entries = (
        f"<span class='c{one.colour % PALETTE}'><i></i><b>{html.escape(name)}{' (dashed)' * one.dashed}</b></span>"
        for name, one in named.items()
    )
    return f"<div class='legend'>{''.join(entries)}</div>"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    if not text:
        return ""
    marked = f" class='{kind}'" if kind else ""
    return f"<text{marked} x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{html.escape(text)}</text>"


def _figure(title: str, inside: str, height: float, legend: str = "") -> str:
    named = html.escape(title, quote=True)
    return (
        f"<figure><figcaption>{named}</figcaption><svg role='img' aria-label='{named}' viewBox='0 0 {WIDTH} {height}'>"
        f"{inside}</svg>{legend}</figure>"
    )
