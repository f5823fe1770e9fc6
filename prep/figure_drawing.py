"""Draw a figure scene: flat, friendly vector art with outlines, supersampled with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from prep.figure_keypoints import FACE, LEFT_HAND, RIGHT_HAND, scene_keypoints
from prep.figure_scene import (
    BACKGROUND_COLOURS,
    BUILDS,
    HAIR_COLOURS,
    HEAD_RADIUS,
    SKIN_COLOURS,
    TOP_COLOURS,
    TROUSERS_COLOURS,
    Scene,
    ball_centre,
    head_point,
    object_grip,
)

Colour = tuple[int, int, int]
WOOD, SHOE, INK = (150, 104, 62), (70, 54, 52), (40, 30, 32)


def render(scene: Scene, width: int, height: int) -> Image.Image:
    """Draw ``scene`` as an RGB picture of ``width`` x ``height`` pixels, antialiased."""
    factor = 3 if width * height > 256 * 256 else 4
    canvas = _Canvas(scene, width * factor, height * factor)
    _draw_room(canvas)
    _draw_behind(canvas)
    _draw_legs(canvas)
    _draw_torso(canvas)
    _draw_head(canvas)
    for side in ("left", "right"):
        _draw_arm(canvas, side)
    _draw_object(canvas)
    return _light(canvas.image.reduce(factor), scene.light)


def _light(image: Image.Image, source: str) -> Image.Image:
    """Multiply by a soft field that never turns one palette colour into another (factors .76 to 1.04)."""
    height, width = image.height, image.width
    x = (np.arange(width, dtype=np.float32) + 0.5) / width - 0.5
    y = ((np.arange(height, dtype=np.float32) + 0.5) / height - 0.5)[:, None]
    if source == "even":
        field = 1.0 - 0.22 * (x * x + y * y)
    elif source == "above":
        field = 0.9 - 0.26 * y + 0 * x
    else:
        field = 0.9 + (-0.28 if source == "left" else 0.28) * x - 0.04 * y
    lit = np.asarray(image, np.float32) * field[:, :, None] + 0.5
    return Image.fromarray(np.minimum(lit, 255).astype(np.uint8))


def shade(colour: Colour, factor: float) -> Colour:
    """The colour with its light multiplied by ``factor``, clipped."""
    return tuple(min(255, max(0, round(c * factor))) for c in colour)


class _Canvas:
    """A supersampled picture that takes shapes in the scene's relative coordinates."""

    def __init__(self, scene: Scene, width: int, height: int):
        self.scene = scene
        self.scale = np.array([width / scene.aspect, height])
        self.unit = scene.unit
        self.outline = max(0.0042 * scene.unit, 0.6 / height)
        self.image = Image.new("RGB", (width, height), BACKGROUND_COLOURS[scene.background])
        self.draw = ImageDraw.Draw(self.image)
        self.keypoints, _ = scene_keypoints(scene)

    def fill(self, polygon: np.ndarray, colour: Colour) -> None:
        """A polygon (n, 2) without outline."""
        self.draw.polygon((polygon * self.scale).ravel().tolist(), fill=colour)

    def shapes(self, polygons: Sequence[np.ndarray], colour: Colour, edge: Colour | None = None) -> None:
        """Polygons as one body: the outlines of all lie behind the fills of all."""
        edge = edge or outline_colour(colour)
        for polygon in polygons:
            self.fill(grow(polygon, self.outline), edge)
        for polygon in polygons:
            self.fill(polygon, colour)

    def stroke(self, path: np.ndarray, thickness: float, colour: Colour) -> None:
        """A line with round ends through ``path`` (n, 2), without outline."""
        points = [tuple(p) for p in (path * self.scale).tolist()]
        thick = max(1.0, thickness * self.scale[1])
        self.draw.line(points, fill=colour, width=round(thick), joint="curve")
        for x, y in (points[0], points[-1]):
            r = thick / 2
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def outline_colour(colour: Colour) -> Colour:
    """A darker tone of the fill; black shapes get a lighter one, so that limbs stay apart."""
    return shade(colour, 0.62) if sum(colour) > 160 else (78, 78, 84)


def grow(polygon: np.ndarray, margin: float) -> np.ndarray:
    """The polygon with every vertex moved outwards by ``margin`` along its normal."""
    tangent = np.roll(polygon, -1, 0) - np.roll(polygon, 1, 0)
    tangent /= np.maximum(np.hypot(*tangent.T), 1e-9)[:, None]
    x, y = polygon.T
    clockwise = np.sign(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))
    return polygon + clockwise * margin * np.stack([tangent[:, 1], -tangent[:, 0]], 1)


def ellipse(centre: np.ndarray, rx: float, ry: float | None = None, angle: float = 0.0, count: int = 40) -> np.ndarray:
    """An ellipse as a polygon, its x axis turned clockwise by ``angle`` radians."""
    a = np.linspace(0, 2 * math.pi, count, endpoint=False)
    points = np.stack([rx * np.cos(a), (rx if ry is None else ry) * np.sin(a)], 1)
    return centre + points @ rotation(angle).T


def rotation(angle: float) -> np.ndarray:
    """The matrix that turns clockwise by ``angle`` radians (y points down)."""
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def capsule(a: np.ndarray, b: np.ndarray, ra: float, rb: float) -> np.ndarray:
    """Two discs and everything between them: a tapered limb."""
    angle = math.atan2(b[1] - a[1], b[0] - a[0])
    around = np.linspace(-math.pi / 2, math.pi / 2, 13)
    end = b + rb * np.stack([np.cos(angle + around), np.sin(angle + around)], 1)
    start = a + ra * np.stack([np.cos(angle + math.pi + around), np.sin(angle + math.pi + around)], 1)
    return np.concatenate([end, start])


def smooth(points: Sequence[np.ndarray], steps: int = 8) -> np.ndarray:
    """A closed Catmull-Rom curve through ``points`` as a polygon."""
    p = np.asarray(points)
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    parts = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(before, p, after, beyond)
    ]
    return np.concatenate(parts)


def _draw_room(canvas: _Canvas) -> None:
    """Wall (already there), floor and the shadow under the figure."""
    scene, wall = canvas.scene, BACKGROUND_COLOURS[canvas.scene.background]
    horizon = scene.ground - 0.055 * scene.unit
    if horizon < 1:
        corners = [(0, horizon), (scene.aspect, horizon), (scene.aspect, 1.01), (0, 1.01)]
        canvas.fill(np.array(corners), shade(wall, 0.9))
        canvas.stroke(np.array(corners[:2]), 0.004, shade(wall, 0.8))
    feet = np.array([scene.points[f"{side}_{part}"] for side in ("left", "right") for part in ("heel", "big_toe")])
    middle, reach = feet[:, 0].mean(), np.ptp(feet[:, 0]) / 2 + 0.05 * scene.unit
    canvas.fill(ellipse(np.array([middle, scene.ground]), reach, 0.022 * scene.unit), shade(wall, 0.74))


def _draw_behind(canvas: _Canvas) -> None:
    """What stands behind the body: stool, string, long hair."""
    scene, u = canvas.scene, canvas.unit
    if scene.legs == "sitting":
        seat = scene.points["pelvis"] + np.array([0, 0.06 * u])
        for dx in (-0.1, 0.1):
            foot = np.array([seat[0] + 1.25 * dx * u, scene.ground])
            canvas.shapes([capsule(seat + np.array([dx * u, 0]), foot, 0.012 * u, 0.01 * u)], WOOD)
        canvas.shapes(
            [capsule(seat - np.array([0.12 * u, 0]), seat + np.array([0.12 * u, 0]), 0.02 * u, 0.02 * u)], WOOD
        )
    hair = HAIR_COLOURS[scene.hair]
    radius = HEAD_RADIUS * u
    if scene.hair_style == "long":
        outline = [
            (0, -1.1),
            (0.95, -0.7),
            (1.14, 0.3),
            (1.16, 1.6),
            (0, 1.7),
            (-1.16, 1.6),
            (-1.14, 0.3),
            (-0.95, -0.7),
        ]
        canvas.shapes([smooth([head_point(scene, *p) for p in outline])], hair)
    elif scene.hair_style == "bun":
        canvas.shapes([ellipse(head_point(scene, 0, -1.36), 0.4 * radius)], hair)
    elif scene.hair_style == "pigtails":
        tails = [
            ellipse(head_point(scene, s * 1.24, 0.5), 0.3 * radius, 0.56 * radius, scene.tilt - s * 0.35)
            for s in (-1, 1)
        ]
        canvas.shapes(tails, hair)
    elif scene.hair_style == "curly":
        angles = np.radians(np.linspace(150, 390, 11))
        curls = [
            ellipse(head_point(scene, 0.98 * math.cos(a), -0.15 + 1.0 * math.sin(a)), 0.34 * radius) for a in angles
        ]
        canvas.shapes([*curls, ellipse(head_point(scene, 0, -0.2), 1.05 * radius)], hair)


def _draw_legs(canvas: _Canvas) -> None:
    scene, u, p = canvas.scene, canvas.unit, canvas.scene.points
    w = BUILDS[scene.build] * u
    colour = TROUSERS_COLOURS[scene.trousers]
    for side in ("left", "right"):
        ankle, heel, toe = p[f"{side}_ankle"], p[f"{side}_heel"], p[f"{side}_big_toe"]
        canvas.shapes([capsule(heel, toe, 0.02 * u, 0.021 * u), capsule(ankle, heel, 0.022 * u, 0.02 * u)], SHOE)
    cloth = [capsule(p["left_hip"], p["right_hip"], 0.05 * w, 0.05 * w)]
    for side in ("left", "right"):
        hip, knee, ankle = (p[f"{side}_{part}"] for part in ("hip", "knee", "ankle"))
        cloth += [
            capsule(hip, knee, 0.052 * w, 0.043 * w),
            capsule(knee, knee + (ankle - knee) * 0.93, 0.043 * w, 0.034 * w),
        ]
    canvas.shapes(cloth, colour)


def _draw_torso(canvas: _Canvas) -> None:
    scene, u, p = canvas.scene, canvas.unit, canvas.scene.points
    w = BUILDS[scene.build] * u
    skin, colour = SKIN_COLOURS[scene.skin], TOP_COLOURS[scene.top]
    canvas.shapes(
        [capsule(p["neck"] + (p["neck"] - p["pelvis"]) * -0.05, p["head"], 0.034 * u, 0.034 * u)], shade(skin, 0.9)
    )
    up = (p["neck"] - p["pelvis"]) / np.hypot(*(p["neck"] - p["pelvis"]))
    across = np.array([-up[1], up[0]])

    def at(x: float, y: float) -> np.ndarray:
        return p["pelvis"] + across * x * w + up * y * u

    half = [(0.04, 0.283), (0.085, 0.272), (0.122, 0.245), (0.118, 0.19), (0.102, 0.1), (0.106, 0.02), (0.108, -0.028)]
    outline = [at(x, y) for x, y in half] + [at(-x, y) for x, y in reversed(half)]
    canvas.shapes([smooth(outline, 6)], colour)
    if scene.top_style == "shirt":
        canvas.stroke(np.array([at(0, 0.24), at(0, -0.028)]), 0.005 * u, outline_colour(colour))
        for y in (0.2, 0.14, 0.08, 0.02):
            canvas.fill(ellipse(at(0.012, y), 0.006 * u, count=12), outline_colour(colour))
        for s in (-1, 1):
            canvas.shapes([np.array([at(0, 0.25), at(s * 0.055, 0.292), at(s * 0.06, 0.24)])], colour)
    else:
        neckline = [
            at(-0.045, 0.285),
            at(0, 0.255 if scene.top_style == "jumper" else 0.235),
            at(0.045, 0.285),
            at(0, 0.3),
        ]
        canvas.fill(smooth(neckline), shade(skin, 0.9))


def _draw_arm(canvas: _Canvas, side: str) -> None:
    scene, u, p = canvas.scene, canvas.unit, canvas.scene.points
    w = BUILDS[scene.build] * u
    skin, colour = SKIN_COLOURS[scene.skin], TOP_COLOURS[scene.top]
    shoulder, elbow, wrist, finger = (p[f"{side}_{part}"] for part in ("shoulder", "elbow", "wrist", "finger"))
    hand = canvas.keypoints[LEFT_HAND if side == "left" else RIGHT_HAND]
    palm = wrist + (finger - wrist) * 0.36
    parts = [capsule(wrist, palm, 0.02 * u, 0.025 * u)]
    parts += [capsule(hand[i], hand[i + 3], 0.0088 * u, 0.0076 * u) for i in (1, 5, 9, 13, 17)]
    canvas.shapes(parts, skin)
    upper, lower = capsule(shoulder, elbow, 0.036 * w, 0.031 * w), capsule(elbow, wrist, 0.031 * w, 0.026 * w)
    if scene.top_style == "top":
        canvas.shapes(
            [capsule(shoulder, elbow, 0.029 * w, 0.026 * w), capsule(elbow, wrist, 0.026 * w, 0.021 * w)], skin
        )
        canvas.shapes([capsule(shoulder, shoulder + (elbow - shoulder) * 0.62, 0.037 * w, 0.037 * w)], colour)
    else:
        canvas.shapes([upper, lower], colour)


def _draw_head(canvas: _Canvas) -> None:
    scene, radius = canvas.scene, HEAD_RADIUS * canvas.unit
    skin, hair = SKIN_COLOURS[scene.skin], HAIR_COLOURS[scene.hair]
    face = canvas.keypoints[FACE]
    if scene.hair_style not in ("long", "curly"):
        canvas.shapes([ellipse(head_point(scene, s * 0.92, 0.14), 0.16 * radius, 0.2 * radius) for s in (-1, 1)], skin)
    skull = [head_point(scene, 0.9 * math.cos(a), -0.1 - 0.85 * math.sin(a)) for a in np.linspace(0, math.pi, 12)[1:-1]]
    canvas.shapes([np.concatenate([face[:17], skull])], skin)
    for side, first in ((-1, 36), (1, 42)):
        eye = face[first : first + 6].mean(0)
        canvas.fill(ellipse(eye, 0.105 * radius, 0.14 * radius, scene.tilt, 20), INK)
        canvas.fill(ellipse(eye + np.array([0.035, -0.05]) * radius, 0.035 * radius, count=10), (255, 255, 255))
        if scene.person == "woman":
            corner = eye + rotation(scene.tilt) @ np.array([side * 0.1, -0.05]) * radius
            lash = eye + rotation(scene.tilt) @ np.array([side * 0.24, -0.16]) * radius
            canvas.stroke(np.array([corner, lash]), 0.05 * radius, INK)
    brow = shade(hair, 0.72)
    for first in (17, 22):
        canvas.stroke(face[first : first + 5], (0.075 if scene.person == "woman" else 0.11) * radius, brow)
    canvas.stroke(face[[29, 33]], 0.1 * radius, shade(skin, 0.82))
    canvas.fill(np.concatenate([face[48:60]]), shade((196, 62, 70), 0.9 if sum(skin) > 350 else 1.0))
    canvas.fill(np.concatenate([face[60:65], face[64:60:-1] * 0.55 + face[60:64][::-1] * 0.45]), (255, 255, 255))
    _draw_hair(canvas, radius, hair)


def _draw_hair(canvas: _Canvas, radius: float, hair: Colour) -> None:
    scene = canvas.scene
    side = 0.28 if scene.hair_style in ("short", "curly") else 0.1
    outer = [(1.0, side), (1.06, -0.3), (0.86, -0.85), (0.45, -1.12), (0, -1.18)]
    parting = 0.25 if scene.hair_style in ("short", "long", "pigtails") else 0.0
    inner = [
        (-0.86, side),
        (-0.8, -0.25),
        (-0.5, -0.42),
        (parting - 0.1, -0.5),
        (parting + 0.1, -0.52),
        (0.6, -0.4),
        (0.8, -0.25),
        (0.86, side),
    ]
    outline = [(x, y) for x, y in outer] + [(-x, y) for x, y in reversed(outer[:-1])] + inner
    canvas.shapes([smooth([head_point(scene, *p) for p in outline], 6)], hair)
    if scene.hair_style == "long":
        for s in (-1, 1):
            lock = [
                (s * 0.84, -0.3),
                (s * 1.06, -0.2),
                (s * 1.16, 0.8),
                (s * 1.1, 1.75),
                (s * 0.8, 1.85),
                (s * 0.74, 1.2),
                (s * 0.9, 0.5),
            ]
            canvas.shapes([smooth([head_point(scene, *p) for p in lock])], hair)


def _draw_object(canvas: _Canvas) -> None:
    scene, u = canvas.scene, canvas.unit
    colour = TOP_COLOURS[scene.held_colour]
    grip = object_grip(scene)
    outward = 1 if scene.held_hand == "left" else -1
    edge = outline_colour(colour)

    def at(x: float, y: float) -> np.ndarray:
        return grip + np.array([x * outward, y]) * u

    if scene.held_object == "ball":
        centre = ball_centre(scene)
        canvas.shapes([ellipse(centre, 0.062 * u)], colour)
        canvas.fill(ellipse(centre + np.array([-0.02, -0.024]) * u, 0.014 * u, 0.01 * u, -0.7), mix(colour, 0.55))
    elif scene.held_object == "balloon":
        canvas.stroke(np.array([at(0, 0.03), at(0.01, -0.06), at(0.04, -0.16)]), 0.005 * u, (110, 110, 116))
        canvas.shapes(
            [
                ellipse(at(0.04, -0.257), 0.082 * u, 0.096 * u),
                np.array([at(0.028, -0.15), at(0.052, -0.15), at(0.04, -0.17)]),
            ],
            colour,
        )
        canvas.fill(
            ellipse(at(0.04, -0.257) + np.array([-0.03, -0.035]) * u, 0.014 * u, 0.024 * u, 0.5), mix(colour, 0.55)
        )
    elif scene.held_object == "book":
        canvas.shapes(
            [np.array([at(-0.045, -0.09), at(0.085, -0.09), at(0.085, 0.07), at(-0.045, 0.07)])], (244, 240, 228), edge
        )
        canvas.shapes([np.array([at(-0.05, -0.09), at(0.078, -0.09), at(0.078, 0.07), at(-0.05, 0.07)])], colour)
        canvas.fill(
            np.array([at(-0.02, -0.055), at(0.05, -0.055), at(0.05, -0.025), at(-0.02, -0.025)]), mix(colour, 0.7)
        )
    elif scene.held_object == "cup":
        canvas.shapes([ellipse(at(0.045, -0.02), 0.026 * u)], colour)
        canvas.fill(ellipse(at(0.045, -0.02), 0.012 * u), BACKGROUND_COLOURS[scene.background])
        canvas.shapes([np.array([at(-0.04, -0.065), at(0.04, -0.065), at(0.032, 0.035), at(-0.032, 0.035)])], colour)
        canvas.shapes([ellipse(at(0, -0.065), 0.04 * u, 0.011 * u)], shade(colour, 0.8), edge)
    elif scene.held_object == "flag":
        canvas.shapes([capsule(at(0, 0.07), at(0, -0.25), 0.007 * u, 0.007 * u)], WOOD)
        wave = [at(0.005 + 0.2 * s, -0.245 + 0.012 * math.sin(6 * s)) for s in np.linspace(0, 1, 9)]
        back = [point + np.array([0, 0.125 * u]) for point in reversed(wave)]
        canvas.shapes([np.array(wave + back)], colour)
    else:
        canvas.shapes([capsule(at(0.02, 0.05), at(0.02, -0.31), 0.007 * u, 0.006 * u)], WOOD)
        dome = [at(0.02 + 0.19 * math.cos(a), -0.19 - 0.125 * math.sin(a)) for a in np.linspace(0, math.pi, 24)]
        scallops = [
            at(0.02 - 0.19 + 0.38 * s, -0.19 - 0.018 * abs(math.sin(3 * math.pi * s))) for s in np.linspace(0, 1, 25)
        ]
        canvas.shapes([np.array(dome + scallops)], colour)
        for x in (-0.063, 0.063):
            canvas.stroke(np.array([at(0.02 + x, -0.19), at(0.02 + x * 0.6, -0.28), at(0.02, -0.313)]), 0.004 * u, edge)


def mix(colour: Colour, whiteness: float) -> Colour:
    """The colour mixed with white."""
    return tuple(round(c + (255 - c) * whiteness) for c in colour)
