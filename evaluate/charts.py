"""Charts as SVG text: no library, no script; colours are CSS classes, so that one drawing suits light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

HEIGHT = 260
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 40


@dataclass(frozen=True)
class Series:
    """A line through ``points`` (x, y); ``band`` (x, low, high) is its interval, ``style`` its CSS class."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    band: Sequence[tuple[float, float, float]] = field(default=())
    markers: bool = False


@dataclass(frozen=True)
class Axes:
    """How a chart is laid out.

    ``log`` is for y; ``line`` a horizontal line to compare with; ``shaded`` a range of x; ``span`` the range of x
    where it is not to follow from the data; ``width`` in the units of the text's size.
    """

    x: str
    y: str
    log: bool = False
    line: float | None = None
    line_name: str = ""
    shaded: tuple[float, float] | None = None
    span: tuple[float, float] | None = None
    width: int = 460


def line_chart(series: Sequence[Series], axes: Axes) -> Markup:
    """Draw ``series`` as an SVG element of fixed proportions; points that a log axis cannot show are left out.

    Returns safe markup: every string is escaped.
    """
    series = [_drawable(one, axes.log) for one in series]
    series = [one for one in series if one.points]
    if not series:
        return Markup('<p class="quiet">nothing to draw</p>')
    x_values = [x for one in series for x, _ in one.points]
    y_values = [y for one in series for _, y in one.points]
    y_values += [y for one in series for _, low, high in one.band for y in (low, high)]
    if axes.line is not None:
        y_values.append(axes.line)
    low, high = axes.span or (min(x_values), max(x_values))
    right = axes.width - RIGHT
    x_scale = _Scale(low, high, LEFT, right)
    y_low, y_high = (min(y_values), max(y_values)) if axes.log else (min(0.0, *y_values), max(y_values))
    y_scale = _Scale(y_low, y_high, HEIGHT - BOTTOM, TOP, log=axes.log, loose=True)

    described = escape(f"{axes.y} over {axes.x}")
    parts = [f'<svg class="chart" viewBox="0 0 {axes.width} {HEIGHT}" role="img" aria-label="{described}">']
    if axes.shaded:
        start, end = (x_scale(x) for x in axes.shaded)
        size = f'width="{end - start:.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        parts.append(f'<rect class="shade" x="{start:.1f}" y="{TOP}" {size}/>')
    for tick in y_scale.ticks():
        y = y_scale(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_scale.ticks():
        x = x_scale(tick)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text class="name" x="{(LEFT + right) / 2}" y="{HEIGHT - 4}" text-anchor="middle">')
    parts.append(f"{escape(axes.x)}</text>")
    if axes.line is not None:
        y = y_scale(axes.line)
        parts.append(f'<line class="bar" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="barname" x="{right}" y="{y - 6:.1f}" text-anchor="end">')
        parts.append(f"{escape(axes.line_name)}</text>")
    for one in series:
        if one.band:
            upper = [f"{x_scale(x):.1f},{y_scale(high):.1f}" for x, _, high in one.band]
            lower = [f"{x_scale(x):.1f},{y_scale(low):.1f}" for x, low, _ in reversed(one.band)]
            parts.append(f'<polygon class="band {one.style}" points="{" ".join(upper + lower)}"/>')
    for one in series:
        points = [(x_scale(x), y_scale(y)) for x, y in one.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line {one.style}" points="{path}"><title>{escape(one.name)}</title></polyline>')
        if one.markers:
            parts += [f'<circle class="dot {one.style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
    parts.append("</svg>")
    return Markup("".join(parts))


def joints_overlay(
    given: Sequence[Sequence[float]],
    found: Sequence[Sequence[float]],
    links: Sequence[Sequence[int]],
    size: tuple[int, int],
) -> Markup:
    """Joints to lay over a picture of ``size`` (width, height): the pose given, and over it the joints found.

    Joints are (x, y, confidence) in pixels; those of confidence 0 are left out, as are bones with one of them.
    """
    width, height = size
    unit = math.sqrt(width * height) / 100
    parts = [f'<svg class="overlay" viewBox="0 0 {width} {height}" aria-hidden="true" style="--unit:{unit:.2f}px">']
    for style, joints in (("given", given), ("found", found)):
        there = {index: f"{x:.1f} {y:.1f}" for index, (x, y, confidence) in enumerate(joints) if confidence > 0}
        bones = "".join(f"M{there[a]}L{there[b]}" for a, b in links if a in there and b in there)
        linked = {joint for link in links for joint in link}
        dots = "".join(f"M{place}h0" for index, place in there.items() if index in linked)
        specks = "".join(f"M{place}h0" for index, place in there.items() if index not in linked)
        parts += [f'<path class="halo" d="{bones}"/>'] if bones else []
        shapes = (("bone", bones), ("dot", dots), ("speck", specks))
        parts += [f'<path class="{kind} {style}" d="{path}"/>' for kind, path in shapes if path]
    return Markup("".join([*parts, "</svg>"]))


def smooth(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """Moving average over about ``width`` points; narrow at the start, where curves are steep, one-sided at the end."""
    result = []
    for index, (x, _) in enumerate(points):
        reach = min(width // 2, index)
        window = [y for _, y in points[index - reach : index + reach + 1]]
        result.append((x, sum(window) / len(window)))
    return result


def thin(points: Sequence[tuple[float, float]], limit: int = 240) -> list[tuple[float, float]]:
    """At most about ``limit`` of the points, evenly spaced, the last one among them."""
    stride = max(1, math.ceil(len(points) / limit))
    return list(points[::-1][::stride][::-1])


class _Scale:
    """Maps data to SVG units; ``loose`` widens the range to whole ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False, loose: bool = False):
        self._log = log
        if high <= low:
            low, high = (low / 2, low * 2) if log else (low - 0.5, low + 0.5)
        self._low, self._high = self._map(low), self._map(high)
        if loose and log:
            span = self._high - self._low
            self._low, self._high = self._low - 0.04 * span, self._high + 0.04 * span
        elif loose:
            step = _step(high - low)
            self._low, self._high = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
        self._start, self._end = start, end

    def _map(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def __call__(self, value: float) -> float:
        share = (self._map(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Round numbers within the range: as few as the range allows, but three."""
        if self._log:
            decades = range(math.floor(self._low), math.ceil(self._high) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), [1 + index / 10 for index in range(90)]):
                every = [step * 10.0**decade for decade in decades for step in steps]
                shown = [tick for tick in every if self._low <= math.log10(tick) <= self._high]
                if len(shown) >= 3:
                    break
            return shown
        step = _step(self._high - self._low)
        first = math.ceil(self._low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self._high / step + 1e-9) + 1)]


def _step(span: float) -> float:
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(step for step in (1, 2, 2.5, 5, 10) if rough <= step * power * (1 + 1e-9))


def _drawable(series: Series, log: bool) -> Series:
    shown = [(x, y) for x, y in series.points if math.isfinite(y) and (y > 0 or not log)]
    band = [(x, low, high) for x, low, high in series.band if not log or low > 0]
    return Series(series.name, shown, series.style, band, series.markers)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
