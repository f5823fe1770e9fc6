"""Histograms and skeletons as SVG text: no library, no script; colours are CSS classes that suit light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from nanodit.keypoints import BODY_JOINTS, BONES

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 34, 40
BINS, FEWEST = 24, 8  # about so many bars, or room for them
COMMON = 0.98  # the share of the values that the axis shows in any case
OUTLIER = 1.5  # a maximum beyond this multiple of the common values goes into a bar of its own
GAP = 10  # between the bars and that one

FOUND, SURE = 0.3, 0.6  # confidences: below the first a joint is drawn as missed, from the second on as certain
CLASSES = ("weak", "fair", "sure")


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
    that the values are shares. Returns safe markup: every string is escaped.
    """
    if not len(values):
        return Markup('<p class="quiet">nothing to draw</p>')
    bins = bin_values(values, whole=not percent)
    room = WIDTH - LEFT - RIGHT - (GAP + 16 if bins.beyond else 0)
    low, high = float(bins.edges[0]), float(bins.edges[-1])
    tallest = int(max(bins.counts.max(), bins.beyond))
    step = max(1.0, round_step(tallest / 3))
    top = math.ceil(tallest / step) * step

    def across(value: float) -> float:
        return LEFT + (value - low) / (high - low) * room

    def height(count: float) -> float:
        # one sample among ten thousand is still to be seen
        return max(1.5, count / top * (HEIGHT - TOP - BOTTOM)) if count else 0.0

    def words(value: float) -> str:
        return f"{100 * value:.3g} %" if percent else f"{value:,.0f}"

    base = HEIGHT - BOTTOM
    label = escape(f"distribution of {name}")
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    for tick in np.arange(0, top + step / 2, step):
        y = base - tick / top * (base - TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:,.0f}</text>')
    for start, end, count in zip(bins.edges[:-1], bins.edges[1:], bins.counts):
        if count:
            last = end - 1 if not percent else end
            span = words(start) if not percent and last <= start else f"{words(start)} to {words(last)}"
            parts.append(_bar(across(start), across(end), base, height(count), f"{span}: {count:,}", "bin"))
    if bins.beyond:
        start = LEFT + room + GAP
        title = f"more, up to {words(float(values.max()))}: {bins.beyond:,}"
        parts.append(_bar(start, WIDTH - RIGHT, base, height(bins.beyond), title, "bin beyond"))
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{base + 18}" text-anchor="end">more</text>')
    step = round_step((high - low) / 5)
    if not percent:
        step = max(1.0, step)
    # single numbers stand below the middle of their bars
    middle = 0.5 if not percent and bins.edges[1] - low == 1 else 0.0
    # the last tick would run into the word "more"
    end = high - (0.08 * (high - low) if bins.beyond else 0)
    for index in range(math.ceil(low / step - 1e-9), math.floor((end - middle) / step + 1e-9) + 1):
        x = across(index * step + middle)
        parts.append(f'<text x="{x:.1f}" y="{base + 18}" text-anchor="middle">{words(index * step)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">')
    parts.append(f"{escape(name)}</text>")
    for row, (value, text) in enumerate(mark for mark in marks if low <= mark[0] <= high):
        x, y = across(value + middle), 11 + 13 * (row % 2)
        anchor = "end" if x > WIDTH / 2 else "start"
        shift = -5 if anchor == "end" else 5
        parts.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8}" y2="{base}"/>')
        parts.append(f'<text class="barname" x="{x + shift:.1f}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')
    parts.append("</svg>")
    return Markup("".join(parts))


def _bar(start: float, end: float, base: float, height: float, title: str, style: str) -> str:
    size = f'width="{max(end - start - 1, 0.5):.1f}" height="{height:.1f}"'
    place = f'x="{start + 0.5:.1f}" y="{base - height:.1f}"'
    return f'<rect class="{style}" {place} {size}><title>{escape(title)}</title></rect>'


def round_step(rough: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(step for step in (1, 2, 5, 10) if rough <= step * power * (1 + 1e-9))


def skeleton(keypoints: np.ndarray, boxes: Sequence[Sequence[float]], width: int, height: int) -> Markup:
    """An SVG drawing to lay over a crop of ``width`` x ``height`` pixels.

    ``keypoints`` (133, 3) hold x, y in pixels and confidence, ``boxes`` (x0, y0, x1, y1, score). Everything is coloured
    by confidence; what is below ``FOUND`` is drawn thin, what was not found (0) not at all.
    """
    unit = math.sqrt(width * height) / 100
    parts = [f'<svg class="overlay" viewBox="0 0 {width} {height}" aria-hidden="true" style="--unit:{unit:.2f}px">']
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
