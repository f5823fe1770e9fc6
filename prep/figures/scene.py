"""The content of a figure picture as plain data: attributes and joints of an articulated person, before any drawing.

A :class:`Scene` is in relative coordinates (x from 0 to the aspect ratio, y from 0 to 1, y down), so that one scene is
the same picture at every size and a change of the scene (a mirror image, say) is a pure function. "Left" and "right" of
arms, legs and hands are the figure's own; a frontal figure's left is on the right side of the picture.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Colour = tuple[int, int, int]
Colours = dict[str, Colour]
Circle = tuple[np.ndarray, float]  # centre and radius

# Names as captions use them -> base sRGB. Chosen far apart in hue or lightness, from each other and from every skin
# tone, so that the nearest colour is still the right one under any of the lights, and after blurring to a few pixels.
TOP_COLOURS: Colours = {
    "red": (212, 32, 38),
    "yellow": (252, 212, 24),
    "green": (34, 146, 62),
    "blue": (30, 84, 208),
    "purple": (122, 42, 166),
    "pink": (255, 124, 190),
    "white": (246, 246, 246),
    "black": (34, 34, 38),
}
TROUSERS_COLOURS: Colours = dict(TOP_COLOURS)
HAIR_COLOURS: Colours = {
    "black": (30, 26, 30),
    "blond": (244, 200, 72),
    "ginger": (206, 84, 22),
    "grey": (166, 168, 176),
}
BACKGROUND_COLOURS: Colours = {
    "cream": (250, 232, 184),
    "mint": (142, 214, 172),
    "azure": (122, 186, 244),
    "lilac": (198, 168, 238),
}
SKIN_COLOURS: Colours = {
    "light": (250, 214, 186),
    "tan": (226, 172, 128),
    "brown": (164, 108, 74),
    "dark": (104, 68, 50),
}

BUILDS = {"slim": 0.92, "medium": 1.0, "broad": 1.1}
HAIR_STYLES = {"woman": ("long", "bun", "curly", "pigtails", "short"), "man": ("short", "curly", "long")}
TOP_STYLES = ("jumper", "shirt", "top")  # long sleeves, long sleeves with collar and buttons, short sleeves
LIGHTS = ("left", "right", "above", "even")
OBJECTS = ("ball", "balloon", "book", "cup", "flag", "umbrella")


HEAD_RADIUS = 0.1  # in figure heights, hair to soles
HAIR_OVER_EARS = ("long", "curly")
# Circles (centre, radius) in head radii, head frame, that bound each hair style beyond the common cap.
HAIR_OUTLINE = {
    "short": (((0, -0.2), 1.0),),
    "long": (((0, -0.2), 1.0), ((-0.85, 1.6), 0.3), ((0.85, 1.6), 0.3)),
    "bun": (((0, -1.38), 0.4),),
    "curly": (((0, -0.25), 1.28),),
    "pigtails": (((-1.3, 0.45), 0.45), ((1.3, 0.45), 0.45)),
}


@dataclass(frozen=True)
class Scene:
    """One picture: what captions and judges talk about, and where everything is.

    ``points`` maps names such as ``left_wrist`` to (x, y); ``unit`` is the length of one figure height; ``tilt``
    (radians, clockwise) and ``turn`` (-1 to 1, towards the right of the picture) place the face; ``ground`` is the y
    of the floor under the figure. All in relative coordinates.
    """

    aspect: float
    person: str
    build: str
    skin: str
    hair: str
    hair_style: str
    top: str
    top_style: str
    trousers: str
    background: str
    light: str
    held_object: str
    held_colour: str
    held_hand: str
    left_arm: str
    right_arm: str
    legs: str
    leading_leg: str
    gaze: str
    framing: str
    placement: str
    unit: float
    tilt: float
    turn: float
    ground: float
    points: dict[str, np.ndarray]

    @property
    def attributes(self) -> dict[str, str]:
        """Return everything about the picture that is a word."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.type == "str"}


class Dice:
    """Reproducible choices: NumPy's Philox keyed by SHA-256 of the parts, used only through its uniform doubles.

    The richer methods of ``Generator`` (``choice``, ``normal``) may change between NumPy versions; ``random`` does not
    in practice.
    """

    def __init__(self, *parts: int | str):
        key = hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:16]
        self._generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))

    def uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * float(self._generator.random())

    def pick(self, items: Sequence[T]) -> T:
        """Return one of ``items``, all equally likely."""
        return items[int(self._generator.random() * len(items))]

    def weighted(self, weights: dict[T, float]) -> T:
        """Return a key of ``weights``, as likely as its value says (the values sum to 1)."""
        mark = float(self._generator.random())
        for item, weight in weights.items():
            mark -= weight
            if mark < 0:
                return item
        return item

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return the items in a random order."""
        marks = self._generator.random(len(items))
        return [items[i] for i in np.argsort(marks, kind="stable")]


def union_box(circles: Sequence[Circle]) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the smallest box round all circles (centre, radius)."""
    centres = np.array([centre for centre, _ in circles])
    radii = np.array([radius for _, radius in circles])[:, None]
    return (*(centres - radii).min(0).tolist(), *(centres + radii).max(0).tolist())


def body_circles(scene: Scene) -> list[Circle]:
    """Return circles that together span the drawn person: the basis of its box and its place in the picture."""
    p, u = scene.points, scene.unit * BUILDS[scene.build]
    circles = [(head_point(scene, 0, -0.1), HEAD_RADIUS * scene.unit * 1.08)]
    circles += [
        (head_point(scene, *centre), r * HEAD_RADIUS * scene.unit) for centre, r in HAIR_OUTLINE[scene.hair_style]
    ]
    for side in ("left", "right"):
        circles += [
            (p[f"{side}_shoulder"], 0.034 * u),
            (p[f"{side}_elbow"], 0.03 * u),
            (p[f"{side}_finger"], 0.012 * u),
        ]
        circles += [(p[f"{side}_hip"], 0.05 * u), (p[f"{side}_knee"], 0.04 * u), (p[f"{side}_ankle"], 0.03 * u)]
        circles += [(p[f"{side}_{part}"], 0.014 * u) for part in ("big_toe", "small_toe", "heel")]
    return circles


def object_circles(scene: Scene) -> list[Circle]:
    """Return circles (centre, radius) that bound the held object."""
    grip, u = object_grip(scene), scene.unit
    outward = 1 if scene.held_hand == "left" else -1

    def at(x: float, y: float) -> np.ndarray:
        return grip + np.array([x * outward, y]) * u

    if scene.held_object == "ball":
        return [(ball_centre(scene), 0.066 * u)]
    if scene.held_object == "balloon":
        return [(at(0.04, -0.25), 0.088 * u), (at(0.04, -0.265), 0.088 * u)]
    if scene.held_object == "book":
        return [(at(0.048, y), 0.07 * u) for y in (-0.035, 0.015)]
    if scene.held_object == "cup":
        return [(at(0.023, -0.018), 0.058 * u), (at(0.07, -0.02), 0.031 * u)]
    if scene.held_object == "flag":
        return [(at(x, y), 0.06 * u) for x in (0.06, 0.12) for y in (-0.195, -0.15)]
    return [(at(x, -0.2), 0.035 * u) for x in (-0.13, 0.17)] + [(at(0.02, -0.255), 0.07 * u)]


def object_grip(scene: Scene) -> np.ndarray:
    """Return the middle of the holding hand."""
    side = scene.held_hand
    return scene.points[f"{side}_wrist"] * 0.4 + scene.points[f"{side}_finger"] * 0.6


def ball_centre(scene: Scene) -> np.ndarray:
    """Return the centre of a ball that lies against the fingers."""
    wrist, finger = (scene.points[f"{scene.held_hand}_{part}"] for part in ("wrist", "finger"))
    return finger + (finger - wrist) / np.hypot(*(finger - wrist)) * 0.036 * scene.unit


def head_point(scene: Scene, u: float, v: float) -> np.ndarray:
    """Return a point of the head frame (in head radii, u to the right, v towards the chin) in the picture."""
    cos, sin = math.cos(scene.tilt), math.sin(scene.tilt)
    return scene.points["head"] + HEAD_RADIUS * scene.unit * np.array([u * cos - v * sin, u * sin + v * cos])
