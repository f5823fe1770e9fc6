"""Curves in a PNG, for the documents: Pillow is all there is to draw with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 900, 700  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 96, 24, 56, 76
COLOURS = (
    "#4c4c4c",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe & Ito
FONT, SMALL = ImageFont.load_default(22), ImageFont.load_default(19)


@dataclass(frozen=True)
class Curve:
    """Points (x, y) in a colour; ``marker`` counts its corners from 2 on, 0 and 1 are a disc and a ring."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    marker: int


@dataclass(frozen=True)
class Panel:
    """Curves over one x on a log axis; ``log`` is for y."""

    title: str
    x: str
    curves: Sequence[Curve]
    log: bool


def draw_panels(panels: Sequence[Panel], legend: Sequence[Curve], path: Path) -> None:
    """Draw panels side by side and under them the names of ``legend``, of which colour and marker count."""
    rows = math.ceil(len(legend) / 3)
    sheet = Image.new("RGB", (WIDTH * len(panels), HEIGHT + 30 * rows + 16), "white")
    pen = ImageDraw.Draw(sheet)
    for i, panel in enumerate(panels):
        _draw_panel(pen, panel, i * WIDTH)
    for i, curve in enumerate(legend):
        x, y = LEFT + (i // rows) * WIDTH * len(panels) // 3, HEIGHT + 30 * (i % rows) + 12
        pen.line((x, y, x + 44, y), fill=COLOURS[curve.colour], width=3)
        _mark(pen, x + 22, y, curve)
        pen.text((x + 56, y), curve.name, fill="black", font=SMALL, anchor="lm")
    sheet.save(path)


def _draw_panel(pen: ImageDraw.ImageDraw, panel: Panel, offset: int) -> None:
    points = [point for curve in panel.curves for point in curve.points]
    across = _Axis([x for x, _ in points], True, offset + LEFT, offset + WIDTH - RIGHT)
    up = _Axis([y for _, y in points], panel.log, HEIGHT - BOTTOM, TOP)
    for value in across.ticks():
        pen.line((across(value), TOP, across(value), HEIGHT - BOTTOM), fill="#e4e4e4")
        pen.text((across(value), HEIGHT - BOTTOM + 8), f"{value:g}", fill="black", font=SMALL, anchor="mt")
    for value in up.ticks():
        pen.line((offset + LEFT, up(value), offset + WIDTH - RIGHT, up(value)), fill="#e4e4e4")
        pen.text((offset + LEFT - 10, up(value)), f"{value:g}", fill="black", font=SMALL, anchor="rm")
    pen.text((offset + LEFT, TOP - 14), panel.title, fill="black", font=FONT, anchor="lb")
    pen.text((offset + WIDTH - RIGHT, HEIGHT - 16), panel.x, fill="black", font=SMALL, anchor="rb")
    for curve in panel.curves:
        places = [(across(x), up(y)) for x, y in sorted(curve.points)]
        pen.line(places, fill=COLOURS[curve.colour], width=2)
        for x, y in places:
            _mark(pen, x, y, curve)


def _mark(pen: ImageDraw.ImageDraw, x: float, y: float, curve: Curve) -> None:
    colour = COLOURS[curve.colour]
    if curve.marker < 2:
        fill = colour if curve.marker == 0 else "white"
        pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill=fill, outline=colour, width=2)
    else:
        pen.regular_polygon((x, y, 8), curve.marker + 1, fill=colour, outline="white")


class _Axis:
    """Maps values onto pixels, by their logarithm where ``log``."""

    def __init__(self, values: Sequence[float], log: bool, start: float, end: float) -> None:
        self.log, self.start, self.end = log, start, end
        self.low, self.high = (self._map(bound(values)) for bound in (min, max))
        margin = 0.04 * (self.high - self.low or 1)
        self.low, self.high = self.low - margin, self.high + margin

    def _map(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        return self.start + (self._map(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis: 1, 2 and 5 times powers of ten, or equidistant ones."""
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            found = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        else:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
            step *= 2 if (self.high - self.low) / step > 10 else 1
            found = [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [value for value in found if self.low <= self._map(value) <= self.high]
