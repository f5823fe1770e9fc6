"""Shapes for figure drawings: a supersampled canvas in relative coordinates, polygons for limbs, and tones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from prep.figures.keypoints import scene_keypoints
from prep.figures.scene import BACKGROUND_COLOURS, BUILDS, Colour, Scene

# Where the light falls from, for the shade on the far side of every shape.
TOWARDS_LIGHT = {"left": (-0.95, -0.3), "right": (0.95, -0.3), "above": (0.0, -1.0), "even": (0.0, 0.0)}


class Canvas:
    """A supersampled picture that takes shapes in the scene's relative coordinates."""

    def __init__(self, scene: Scene, width: int, height: int):
        self.scene, self.points, self.unit = scene, scene.points, scene.unit
        self.girth = scene.unit * BUILDS[scene.build]
        self.keypoints, _ = scene_keypoints(scene)
        self.image = Image.new("RGB", (width, height), BACKGROUND_COLOURS[scene.background])
        self._scale = np.array([width / scene.aspect, height])
        self._draw = ImageDraw.Draw(self.image)
        self._outline = max(0.0042 * scene.unit, 0.6 / height)
        self._depth = 0.006 * scene.unit  # of the shade
        self._shift = self._depth * np.array(TOWARDS_LIGHT[scene.light])

    def fill(self, polygon: np.ndarray, colour: Colour) -> None:
        """Fill a polygon (n, 2), without outline."""
        self._draw.polygon((polygon * self._scale).ravel().tolist(), fill=colour)

    def shapes(self, polygons: Sequence[np.ndarray], colour: Colour, edge: Colour | None = None) -> None:
        """Draw polygons as one body: all outlines behind all fills, and the side away from the light in shade."""
        normals = [outward_normals(polygon) for polygon in polygons]
        for polygon, normal in zip(polygons, normals):
            self.fill(polygon + self._outline * normal, edge or outline_colour(colour))
        if not self._shift.any():
            for polygon in polygons:
                self.fill(polygon, colour)
            return
        for polygon in polygons:
            self.fill(polygon, shade(colour, 0.87))
        for polygon, normal in zip(polygons, normals):
            self.fill(polygon - self._depth * normal + self._shift, colour)

    def stroke(self, path: np.ndarray, thickness: float, colour: Colour) -> None:
        """Draw a line with round ends through ``path`` (n, 2), without outline."""
        points = [tuple(p) for p in (path * self._scale).tolist()]
        thick = max(1.0, thickness * self._scale[1])
        self._draw.line(points, fill=colour, width=round(thick), joint="curve")
        for x, y in (points[0], points[-1]):
            r = thick / 2
            self._draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def shade(colour: Colour, factor: float) -> Colour:
    """Return the colour with its light multiplied by ``factor``, clipped."""
    return tuple(min(255, max(0, round(c * factor))) for c in colour)


def mix(colour: Colour, other: Colour, share: float) -> Colour:
    """Return the colour with ``share`` of another one in it."""
    return tuple(round(c + (o - c) * share) for c, o in zip(colour, other))


def outline_colour(colour: Colour) -> Colour:
    """Return a darker tone of the fill; black shapes get a lighter one, so that limbs stay apart."""
    return shade(colour, 0.62) if sum(colour) > 160 else (84, 84, 90)


def outward_normals(polygon: np.ndarray) -> np.ndarray:
    """Return unit vectors (n, 2) that point out of the polygon (n, 2) at its vertices."""
    following, preceding = np.concatenate([polygon[1:], polygon[:1]]), np.concatenate([polygon[-1:], polygon[:-1]])
    tangent = following - preceding
    length = np.sqrt(tangent[:, 0] ** 2 + tangent[:, 1] ** 2)
    doubled_area = np.sum(polygon[:, 0] * tangent[:, 1])  # its sign tells which way round the vertices go
    return tangent[:, ::-1] * (np.sign(doubled_area) * np.array([1, -1])) / np.maximum(length, 1e-9)[:, None]


def ellipse(centre: np.ndarray, rx: float, ry: float | None = None, angle: float = 0.0, count: int = 40) -> np.ndarray:
    """Return an ellipse as a polygon, its x axis turned clockwise by ``angle`` radians."""
    a = np.linspace(0, 2 * math.pi, count, endpoint=False)
    points = np.stack([rx * np.cos(a), (rx if ry is None else ry) * np.sin(a)], 1)
    return centre + points @ rotation(angle).T


def rotation(angle: float) -> np.ndarray:
    """Return the matrix that turns clockwise by ``angle`` radians (y points down)."""
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def capsule(a: np.ndarray, b: np.ndarray, ra: float, rb: float, flat: bool = False) -> np.ndarray:
    """Return two discs and all between them, a tapered limb; ``flat`` cuts it straight at ``b``, like a cuff."""
    angle = math.atan2(b[1] - a[1], b[0] - a[0])
    around = np.linspace(-math.pi / 2, math.pi / 2, 13)
    start = a + ra * np.stack([np.cos(angle + math.pi + around), np.sin(angle + math.pi + around)], 1)
    around = np.linspace(-1, 1, 5) if flat else around
    if flat:
        end = b + rb * np.outer(around, [-math.sin(angle), math.cos(angle)])
    else:
        end = b + rb * np.stack([np.cos(angle + around), np.sin(angle + around)], 1)
    return np.concatenate([end, start])


def smooth(points: Sequence[np.ndarray], steps: int = 6) -> np.ndarray:
    """Return a closed Catmull-Rom curve through ``points`` as a polygon."""
    p = np.asarray(points)
    t = np.linspace(0, 1, steps, endpoint=False)[:, None, None]
    a, b, c, d = np.roll(p, 1, 0), p, np.roll(p, -1, 0), np.roll(p, -2, 0)
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return curve.transpose(1, 0, 2).reshape(-1, 2)  # from (steps, n, 2)
