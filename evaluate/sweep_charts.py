"""Two drawings that only sweeps need, as SVG text: a value for each seed of each arm, and quality against cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from nanodit.svg import round_step

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 16, 44
NAME_LIMIT = 9  # letters of an arm's name below a column


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
        return Markup('<p class="quiet">nothing to draw</p>')
    low, high = _widened([value for name in arms for value in values[name].values()])
    step = (WIDTH - LEFT - RIGHT) / len(arms)
    parts = [_open(f"{title} of every training seed"), *_grid(low, high)]

    def place(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    centres = {name: LEFT + (index + 0.5) * step for index, name in enumerate(arms)}
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
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{escape(short)}</text>')
    return Markup("".join([*parts, "</svg>"]))


def scatter(points: Sequence[Point], front: Sequence[str], x_title: str, y_title: str) -> Markup:
    """Draw quality (y) against cost (x); a cross is the range of the seeds, steps join the points on the ``front``."""
    if not points:
        return Markup('<p class="quiet">nothing to draw</p>')
    x_low, x_high = _widened([value for point in points for value in point.x_range])
    y_low, y_high = _widened([value for point in points for value in point.y_range])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [_open(f"{y_title} against {x_title}"), *_grid(y_low, y_high)]

    def across(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (right - LEFT)

    def up(value: float) -> float:
        return bottom - (value - y_low) / (y_high - y_low) * (bottom - TOP)

    for tick in _ticks(x_low, x_high):
        parts.append(f'<text x="{across(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{_number(tick)}</text>')
    parts.append(f'<text class="name" x="{(LEFT + right) / 2:.1f}" y="{HEIGHT - 6}" text-anchor="middle">')
    parts.append(f"{escape(x_title)}</text>")
    chosen = [point for name in front for point in points if point.name == name]
    if len(chosen) > 1:
        corners = [f"{across(chosen[0].x):.1f},{up(chosen[0].y):.1f}"]
        for one, other in pairwise(chosen):
            corners += [f"{across(other.x):.1f},{up(one.y):.1f}", f"{across(other.x):.1f},{up(other.y):.1f}"]
        parts.append(f'<polyline class="front" points="{" ".join(corners)}"/>')
    taken: list[tuple[float, float]] = []
    for point in points:
        x, y = across(point.x), up(point.y)
        (left, rightmost), (lower, upper) = (
            [f"{across(v):.1f}" for v in point.x_range],
            [f"{up(v):.1f}" for v in point.y_range],
        )
        parts.append(f'<path class="range {point.style}" d="M{left} {y:.1f}H{rightmost}M{x:.1f} {lower}V{upper}"/>')
        parts.append(f'<circle class="dot {point.style}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        inside = x < WIDTH - 90
        anchor, shift = ("start", 9) if inside else ("end", -9)
        height = y - 8
        while any(abs(x - left) < 60 and abs(height - other) < 12 for left, other in taken):
            height += 13
        taken.append((x, height))
        parts.append(f'<text class="label" x="{x + shift:.1f}" y="{height:.1f}" text-anchor="{anchor}">')
        parts.append(f"{escape(point.name)}</text>")
    return Markup("".join([*parts, "</svg>"]))


def _open(described: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(described)}">'


def _grid(low: float, high: float) -> list[str]:
    parts = []
    for tick in _ticks(low, high):
        y = HEIGHT - BOTTOM - (tick - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    return parts


def _widened(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values with some air; not from zero, since differences between arms are small."""
    low, high = min(values), max(values)
    air = 0.12 * (high - low) or 0.1 * abs(high) or 0.5
    return low - air, high + air


def _ticks(low: float, high: float) -> list[float]:
    step = round_step((high - low) / 5)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}".replace("-", "−")
