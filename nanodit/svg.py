"""Charts, histograms and skeletons as SVG text: no library, no script; colours are CSS classes for light and dark.

What is drawn is returned as safe markup: every string is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from markupsafe import Markup, escape

from nanodit.keypoints import BODY_JOINTS, BONES

NOTHING = Markup('<p class="quiet">nothing to draw</p>')
STEPS, FINE_STEPS = (1, 2, 5, 10), (1, 2, 2.5, 5, 10)  # between ticks, times a power of ten
BINS, FEWEST = 24, 8  # about so many bars, or room for them
COMMON = 0.98  # the share of the values that the axis shows in any case
OUTLIER = 1.5  # a maximum beyond this multiple of the common values goes into a bar of its own
GAP = 10  # between the bars and that one
NAME_LIMIT = 9  # letters of an arm's name below a column

FOUND, SURE = 0.3, 0.6  # confidences: below the first a joint is drawn as missed, from the second on as certain
CLASSES = ("weak", "fair", "sure")


@dataclass(frozen=True)
class Frame:
    """The size of a chart and the margins around its plot, in the units of the text's size."""

    width: int
    height: int
    left: int
    right_margin: int
    top: int
    bottom: int

    @property
    def right(self) -> int:
        """The right edge of the plot."""
        return self.width - self.right_margin

    @property
    def base(self) -> int:
        """The lower edge of the plot."""
        return self.height - self.bottom

    def open(self, described: str) -> str:
        """Return the element's opening tag."""
        size = f'viewBox="0 0 {self.width} {self.height}"'
        return f'<svg class="chart" {size} role="img" aria-label="{escape(described)}">'

    def grid(self, ticks: Iterable[float], place: Callable[[float], float], word: Callable[[float], str]) -> list[str]:
        """Return a labelled horizontal line for each tick of the vertical axis."""
        parts = []
        for tick in ticks:
            y = place(tick)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end">{word(tick)}</text>')
        return parts

    def below(self, x: float, word: str, drop: int = 18) -> str:
        """Return a label of the horizontal axis."""
        return f'<text x="{x:.1f}" y="{self.base + drop}" text-anchor="middle">{escape(word)}</text>'

    @property
    def axis(self) -> str:
        """The line of the horizontal axis."""
        return f'<line class="axis" x1="{self.left}" x2="{self.right}" y1="{self.base}" y2="{self.base}"/>'

    def name(self, text: str, lift: int = 4) -> str:
        """Return what the horizontal axis is called."""
        place = f'x="{(self.left + self.right) / 2}" y="{self.height - lift}"'
        return f'<text class="name" {place} text-anchor="middle">{escape(text)}</text>'


HISTOGRAM = Frame(460, 230, 46, 14, 34, 40)
LINES = Frame(460, 260, 46, 14, 14, 40)
POINTS = Frame(360, 230, 52, 18, 16, 44)


class Scale:
    """A map from data to SVG units; ``loose`` widens the range to whole ticks, ``steps`` may lie between ticks."""

    def __init__(
        self,
        low: float,
        high: float,
        start: float,
        end: float,
        *,
        log: bool = False,
        loose: bool = False,
        steps: Sequence[float] = FINE_STEPS,
    ):
        self._log, self._steps = log, steps
        if high <= low:
            low, high = (low / 2, low * 2) if log else (low - 0.5, low + 0.5)
        self._low, self._high = self._map(low), self._map(high)
        if loose and log:
            span = self._high - self._low
            self._low, self._high = self._low - 0.04 * span, self._high + 0.04 * span
        elif loose:
            step = round_step((high - low) / 5, steps)
            self._low, self._high = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
        self._start, self._end = start, end

    def _map(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def __call__(self, value: float) -> float:
        share = (self._map(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Return round numbers within the range; of a logarithmic one as few as it allows, but three."""
        if self._log:
            decades = range(math.floor(self._low), math.ceil(self._high) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), [1 + index / 10 for index in range(90)]):
                every = [step * 10.0**decade for decade in decades for step in steps]
                shown = [tick for tick in every if self._low <= math.log10(tick) <= self._high]
                if len(shown) >= 3:
                    break
            return shown
        step = round_step((self._high - self._low) / 5, self._steps)
        first = math.ceil(self._low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self._high / step + 1e-9) + 1)]


def round_step(rough: float, steps: Sequence[float] = STEPS) -> float:
    """Return the smallest of ``steps`` times a power of ten that is not below ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(step for step in steps if rough <= step * power * (1 + 1e-9))


def _number(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


@dataclass(frozen=True)
class Bins:
    """``counts`` of values in [``edges[i]``, ``edges[i + 1]``); ``beyond`` are larger than the last edge."""

    edges: np.ndarray
    counts: np.ndarray
    beyond: int


def bin_values(values: np.ndarray, whole: bool = True) -> Bins:
    """Count ``values`` (n,), which are not negative, in bins of a round width; rare huge ones are counted as beyond.

    ``whole`` numbers get bins of at least 1.
    """
    common = float(np.quantile(values, COMMON, method="lower"))
    top = float(values.max())
    limit = top if top <= OUTLIER * common else common
    low = float(values.min())
    width = round_step(max(limit - low, 1e-9) / BINS) if limit > low else (1.0 if whole else 0.01)
    width = max(1.0, width) if whole else width
    first, last = math.floor(low / width + 1e-9), math.floor(limit / width + 1e-9) + 1
    last = max(last, first + FEWEST)
    edges = np.arange(first, last + 1) * width
    places = np.floor(values / width + 1e-9).astype(np.int64) - first
    inside = places < last - first
    counts = np.bincount(places[inside], minlength=last - first)
    return Bins(edges, counts, int((~inside).sum()))


def histogram(values: np.ndarray, name: str, marks: Sequence[tuple[float, str]] = (), percent: bool = False) -> Markup:
    """Draw the distribution of ``values`` (n,) as an SVG element of fixed proportions.

    ``name`` is what the horizontal axis counts, ``marks`` are (value, label) lines to compare with, ``percent`` says
    that the values are shares.
    """
    if not len(values):
        return NOTHING
    frame, bins = HISTOGRAM, bin_values(values, whole=not percent)
    room = frame.right - frame.left - (GAP + 16 if bins.beyond else 0)
    low, high = float(bins.edges[0]), float(bins.edges[-1])
    tallest = int(max(bins.counts.max(), bins.beyond))
    step = max(1.0, round_step(tallest / 3))
    top = math.ceil(tallest / step) * step
    across, base = Scale(low, high, frame.left, frame.left + room), frame.base

    def height(count: float) -> float:
        # one sample among ten thousand is still to be seen
        return max(1.5, count / top * (base - frame.top)) if count else 0.0

    def words(value: float) -> str:
        return f"{100 * value:.3g} %" if percent else f"{value:,.0f}"

    parts = [frame.open(f"distribution of {name}")]
    parts += frame.grid(np.arange(0, top + step / 2, step), Scale(0, top, base, frame.top), "{:,.0f}".format)
    for start, end, count in zip(bins.edges[:-1], bins.edges[1:], bins.counts):
        if count:
            last = end - 1 if not percent else end
            span = words(start) if not percent and last <= start else f"{words(start)} to {words(last)}"
            parts.append(_bar(across(start), across(end), base, height(count), f"{span}: {count:,}", "bin"))
    if bins.beyond:
        start = frame.left + room + GAP
        title = f"more, up to {words(float(values.max()))}: {bins.beyond:,}"
        parts.append(_bar(start, frame.right, base, height(bins.beyond), title, "bin beyond"))
        parts.append(f'<text x="{frame.right}" y="{base + 18}" text-anchor="end">more</text>')
    step = round_step((high - low) / 5)
    if not percent:
        step = max(1.0, step)
    # single numbers stand below the middle of their bars
    middle = 0.5 if not percent and bins.edges[1] - low == 1 else 0.0
    # the last tick would run into the word "more"
    end = high - (0.08 * (high - low) if bins.beyond else 0)
    for index in range(math.ceil(low / step - 1e-9), math.floor((end - middle) / step + 1e-9) + 1):
        parts.append(frame.below(across(index * step + middle), words(index * step)))
    parts += [frame.axis, frame.name(name)]
    for row, (value, text) in enumerate(mark for mark in marks if low <= mark[0] <= high):
        x, y = across(value + middle), 11 + 13 * (row % 2)
        anchor = "end" if x > frame.width / 2 else "start"
        shift = -5 if anchor == "end" else 5
        parts.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8}" y2="{base}"/>')
        parts.append(f'<text class="barname" x="{x + shift:.1f}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')
    return Markup("".join([*parts, "</svg>"]))


def _bar(start: float, end: float, base: float, height: float, title: str, style: str) -> str:
    size = f'width="{max(end - start - 1, 0.5):.1f}" height="{height:.1f}"'
    place = f'x="{start + 0.5:.1f}" y="{base - height:.1f}"'
    return f'<rect class="{style}" {place} {size}><title>{escape(title)}</title></rect>'


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
    """Draw ``series`` as an SVG element of fixed proportions; points that a log axis cannot show are left out."""
    series = [_drawable(one, axes.log) for one in series]
    series = [one for one in series if one.points]
    if not series:
        return NOTHING
    x_values = [x for one in series for x, _ in one.points]
    y_values = [y for one in series for _, y in one.points]
    y_values += [y for one in series for _, low, high in one.band for y in (low, high)]
    if axes.line is not None:
        y_values.append(axes.line)
    frame = replace(LINES, width=axes.width)
    low, high = axes.span or (min(x_values), max(x_values))
    across = Scale(low, high, frame.left, frame.right)
    low, high = (min(y_values), max(y_values)) if axes.log else (min(0.0, *y_values), max(y_values))
    up = Scale(low, high, frame.base, frame.top, log=axes.log, loose=True)
    parts = [frame.open(f"{axes.y} over {axes.x}")]
    if axes.shaded:
        start, end = (across(x) for x in axes.shaded)
        size = f'width="{end - start:.1f}" height="{frame.base - frame.top}"'
        parts.append(f'<rect class="shade" x="{start:.1f}" y="{frame.top}" {size}/>')
    parts += frame.grid(up.ticks(), up, _number)
    parts += [frame.below(across(tick), _number(tick)) for tick in across.ticks()]
    parts += [frame.axis, frame.name(axes.x)]
    if axes.line is not None:
        y = up(axes.line)
        parts.append(f'<line class="bar" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="barname" x="{frame.right}" y="{y - 6:.1f}" text-anchor="end">')
        parts.append(f"{escape(axes.line_name)}</text>")
    for one in series:
        if one.band:
            upper = [f"{across(x):.1f},{up(high):.1f}" for x, _, high in one.band]
            lower = [f"{across(x):.1f},{up(low):.1f}" for x, low, _ in reversed(one.band)]
            parts.append(f'<polygon class="band {one.style}" points="{" ".join(upper + lower)}"/>')
    for one in series:
        points = [(across(x), up(y)) for x, y in one.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line {one.style}" points="{path}"><title>{escape(one.name)}</title></polyline>')
        if one.markers:
            parts += [f'<circle class="dot {one.style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
    return Markup("".join([*parts, "</svg>"]))


def _drawable(series: Series, log: bool) -> Series:
    shown = [(x, y) for x, y in series.points if math.isfinite(y) and (y > 0 or not log)]
    band = [(x, low, high) for x, low, high in series.band if not log or low > 0]
    return Series(series.name, shown, series.style, band, series.markers)


def smooth(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """Return the moving average over about ``width`` points, fewer at the start, where curves are steep."""
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


@dataclass(frozen=True)
class Point:
    """A named place on a scatter plot with the range of its values over seeds (x and y)."""

    name: str
    style: str
    x: float
    y: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]


def seed_points(values: Mapping[str, Mapping[int, float]], styles: Mapping[str, str], title: str) -> Markup:
    """Draw arms (name -> training seed -> value) as columns: a dot for each seed, a bar for the mean.

    The dots of one seed in neighbouring columns are joined: what pairing by seed takes away shows as parallel lines.
    """
    arms = [name for name in values if values[name]]
    if not arms:
        return NOTHING
    frame = POINTS
    place = _roomy_scale([value for name in arms for value in values[name].values()], frame.base, frame.top)
    step = (frame.right - frame.left) / len(arms)
    parts = [frame.open(f"{title} of every training seed"), *frame.grid(place.ticks(), place, _long_number)]
    centres = {name: frame.left + (index + 0.5) * step for index, name in enumerate(arms)}
    for one, other in pairwise(arms):
        for seed in sorted(values[one].keys() & values[other].keys()):
            start, end = f"{centres[one]:.1f},{place(values[one][seed]):.1f}", f"{centres[other]:.1f},"
            parts.append(f'<polyline class="link" points="{start} {end}{place(values[other][seed]):.1f}"/>')
    for name in arms:
        x, own = centres[name], values[name]
        mean = place(math.fsum(own.values()) / len(own))
        reach = min(20.0, step / 3)
        parts.append(f'<line class="mean" x1="{x - reach:.1f}" x2="{x + reach:.1f}" y1="{mean:.1f}" y2="{mean:.1f}"/>')
        for seed in sorted(own):
            title = f"<title>{escape(name)}, seed {seed}: {own[seed]:.4g}</title>"
            parts.append(
                f'<circle class="dot {styles[name]}" cx="{x:.1f}" cy="{place(own[seed]):.1f}" r="4">{title}</circle>'
            )
        short = name if len(name) <= NAME_LIMIT else name[: NAME_LIMIT - 1] + "…"
        parts.append(frame.below(x, short, 20))
    return Markup("".join([*parts, "</svg>"]))


def scatter(points: Sequence[Point], front: Sequence[str], x_title: str, y_title: str) -> Markup:
    """Draw quality (y) against cost (x); a cross is the range of the seeds, steps join the points on the ``front``."""
    if not points:
        return NOTHING
    frame = POINTS
    across = _roomy_scale([value for point in points for value in point.x_range], frame.left, frame.right)
    up = _roomy_scale([value for point in points for value in point.y_range], frame.base, frame.top)
    parts = [frame.open(f"{y_title} against {x_title}"), *frame.grid(up.ticks(), up, _long_number)]
    parts += [frame.below(across(tick), _long_number(tick)) for tick in across.ticks()]
    parts.append(frame.name(x_title, 6))
    chosen = [point for name in front for point in points if point.name == name]
    if len(chosen) > 1:
        corners = [f"{across(chosen[0].x):.1f},{up(chosen[0].y):.1f}"]
        for one, other in pairwise(chosen):
            corners += [f"{across(other.x):.1f},{up(one.y):.1f}", f"{across(other.x):.1f},{up(other.y):.1f}"]
        parts.append(f'<polyline class="front" points="{" ".join(corners)}"/>')
    taken: list[tuple[float, float]] = []
    for point in points:
        x, y = across(point.x), up(point.y)
        left, right = (f"{across(value):.1f}" for value in point.x_range)
        lower, upper = (f"{up(value):.1f}" for value in point.y_range)
        parts.append(f'<path class="range {point.style}" d="M{left} {y:.1f}H{right}M{x:.1f} {lower}V{upper}"/>')
        parts.append(f'<circle class="dot {point.style}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        anchor, shift = ("start", 9) if x < frame.width - 90 else ("end", -9)
        height = y - 8
        while any(abs(x - other) < 60 and abs(height - level) < 12 for other, level in taken):
            height += 13
        taken.append((x, height))
        parts.append(f'<text class="label" x="{x + shift:.1f}" y="{height:.1f}" text-anchor="{anchor}">')
        parts.append(f"{escape(point.name)}</text>")
    return Markup("".join([*parts, "</svg>"]))


def _roomy_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """Return a scale with some air around the values; not from zero, since differences between arms are small."""
    low, high = min(values), max(values)
    air = 0.12 * (high - low) or 0.1 * abs(high) or 0.5
    return Scale(low - air, high + air, start, end, steps=STEPS)


def _long_number(value: float) -> str:
    return _number(value, 4).replace("-", "−")


def skeleton(keypoints: np.ndarray, boxes: Sequence[Sequence[float]], width: int, height: int) -> Markup:
    """Draw an SVG to lay over a crop of ``width`` x ``height`` pixels.

    ``keypoints`` (133, 3) hold x, y in pixels and confidence, ``boxes`` (x0, y0, x1, y1, score). Everything is coloured
    by confidence; what is below ``FOUND`` is drawn thin, what was not found (0) not at all.
    """
    parts = [_overlay(width, height)]
    for x0, y0, x1, y1, *_ in boxes:
        place = f'x="{x0:.0f}" y="{y0:.0f}" width="{max(x1 - x0, 0):.0f}" height="{max(y1 - y0, 0):.0f}"'
        parts.append(f'<rect class="box" {place}/>')
    bones: dict[str, list[str]] = {name: [] for name in CLASSES}
    dots: dict[tuple[str, str], list[str]] = {(kind, name): [] for kind in ("dot", "speck") for name in CLASSES}
    places = [f"{x:.0f} {y:.0f}" for x, y, _ in keypoints]
    confidence = keypoints[:, 2]
    for a, b in BONES:
        if min(confidence[a], confidence[b]) > 0:
            bones[_class_of(min(confidence[a], confidence[b]))].append(f"M{places[a]}L{places[b]}")
    for index, place in enumerate(places):
        if confidence[index] > 0:
            kind = "dot" if index < BODY_JOINTS else "speck"
            dots[kind, _class_of(confidence[index])].append(f"M{place}h0")
    for name, lines in bones.items():
        if lines:
            parts.append(
                f'<path class="bone halo" d="{"".join(lines)}"/><path class="bone {name}" d="{"".join(lines)}"/>'
            )
    for (kind, name), points in dots.items():
        if points:
            parts.append(f'<path class="{kind} {name}" d="{"".join(points)}"/>')
    parts.append("</svg>")
    return Markup("".join(parts))


def _class_of(confidence: float) -> str:
    return "sure" if confidence >= SURE else "fair" if confidence >= FOUND else "weak"


def joints_overlay(
    given: Sequence[Sequence[float]],
    found: Sequence[Sequence[float]],
    links: Sequence[Sequence[int]],
    size: tuple[int, int],
) -> Markup:
    """Joints to lay over a picture of ``size`` (width, height): the pose given, and over it the joints found.

    Joints are (x, y, confidence) in pixels; those of confidence 0 are left out, as are bones with one of them.
    """
    parts = [_overlay(*size)]
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


def _overlay(width: int, height: int) -> str:
    """Return the opening tag of a drawing over a picture; ``--unit`` is the width of its strokes."""
    unit = math.sqrt(width * height) / 100
    return f'<svg class="overlay" viewBox="0 0 {width} {height}" aria-hidden="true" style="--unit:{unit:.2f}px">'
