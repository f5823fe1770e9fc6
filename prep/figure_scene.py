"""What a figure picture shows: attributes and joints of an articulated person, before anything is drawn.

A :class:`Scene` is plain data in relative coordinates (x from 0 to the aspect ratio, y from 0 to 1, y down), so that one scene
is the same picture at every size and a change of the scene (a mirror image, say) is a pure function. "Left" and "right" of arms,
legs and hands are the figure's own; a frontal figure's left is on the right side of the picture.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Colours = dict[str, tuple[int, int, int]]

# Names as captions use them -> base sRGB. Chosen far apart in hue or lightness, from each other and from every skin tone, so
# that the nearest colour is still the right one under any of the lights, and after blurring to a few pixels.
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

# Picture shapes (width, height) of the production buckets, and how often each is drawn.
SHAPES = {
    (1024, 1024): 0.22,
    (1216, 832): 0.13,
    (832, 1216): 0.13,
    (1280, 768): 0.13,
    (768, 1280): 0.13,
    (1344, 704): 0.13,
    (704, 1344): 0.13,
}
ASPECT_JITTER = 0.02
# Visible joints stay this far from each border, as a fraction of that side. Buckets of small bases have rounded sides (88x48
# stands for 1344x704, 4 % narrower), so a centre crop may take 3 % of either end.
MARGIN = 0.035

BUILDS = {"slim": 0.92, "medium": 1.0, "broad": 1.1}
HAIR_STYLES = {"woman": ("long", "bun", "curly", "pigtails", "short"), "man": ("short", "curly", "long")}
TOP_STYLES = ("jumper", "shirt", "top")  # long sleeves, long sleeves with collar and buttons, short sleeves
LIGHTS = ("left", "right", "above", "even")
PLACEMENTS = ("left", "centre", "right")

# Arm poses: ranges in degrees of upper arm and forearm, measured from straight down towards the outside.
ARM_POSES = {
    "down": ((8, 18), (2, 14)),
    "hip": ((44, 54), (-62, -50)),
    "wave": ((72, 100), (150, 176)),
    "raised": ((148, 164), (160, 182)),
    "out": ((80, 100), (80, 100)),
    "low": ((14, 24), (12, 26)),
    "bent": ((18, 34), (98, 128)),
}
FREE_ARM_POSES = ("down", "hip", "wave", "raised", "out")
OBJECTS = {
    "ball": ("low", "bent", "out", "raised"),
    "balloon": ("bent", "low", "out"),
    "book": ("low", "bent", "out"),
    "cup": ("bent", "out"),
    "flag": ("bent", "out", "raised"),
    "umbrella": ("bent",),
}
# Leg poses: thigh and shin of the leading leg, then of the other, in degrees from straight down towards the outside.
LEG_POSES = {
    "straight": ((2, 6), (0, 3), (2, 6), (0, 3)),
    "apart": ((13, 20), (8, 14), (13, 20), (8, 14)),
    "walking": ((18, 24), (6, 12), (8, 14), (30, 42)),
    "lifted": ((58, 74), (-26, -8), (0, 4), (0, 3)),
    "lunge": ((40, 48), (-12, 2), (26, 32), (24, 32)),
    "jumping": ((38, 50), (-36, -18), (20, 28), (26, 40)),
    "sitting": ((12, 20), (0, 5), (12, 20), (0, 5)),
}
LEG_SHARES = {
    "straight": 0.2,
    "apart": 0.2,
    "walking": 0.18,
    "lifted": 0.12,
    "lunge": 0.1,
    "jumping": 0.08,
    "sitting": 0.12,
}

# Lengths in figure heights (hair to soles, standing).
HEAD_RADIUS = 0.1
HAIR_RISE = 0.018
NECK = 0.044
TORSO = 0.265
SHOULDER = 0.098
HIP = 0.06
UPPER_ARM, FOREARM, HAND = 0.148, 0.136, 0.058
THIGH, SHIN = 0.205, 0.2
FORESHORTENED_THIGH = 0.11  # a sitting figure's thighs point at the viewer
SOLE = 0.045


@dataclass(frozen=True)
class Scene:
    """One picture: what captions and judges talk about, and where everything is.

    ``points`` maps names such as ``left_wrist`` to (x, y); ``unit`` is the length of one figure height; ``tilt`` (radians,
    clockwise) and ``turn`` (-1 to 1, towards the right of the picture) place the face; ``ground`` is the y of the floor under
    the figure. All in relative coordinates.
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
    unit: float = field(metadata={"geometry": True})
    tilt: float = field(metadata={"geometry": True})
    turn: float = field(metadata={"geometry": True})
    ground: float = field(metadata={"geometry": True})
    points: dict[str, np.ndarray] = field(metadata={"geometry": True})

    @property
    def attributes(self) -> dict[str, str]:
        """Everything about the picture that is a word."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata and f.name != "aspect"}


class Dice:
    """Reproducible choices: NumPy's Philox keyed by SHA-256 of the parts, used only through its uniform doubles.

    The richer methods of ``Generator`` (``choice``, ``normal``) may change between NumPy versions; ``random`` does not in practice.
    """

    def __init__(self, *parts: int | str):
        key = hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:16]
        self._generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * float(self._generator.random())

    def pick(self, items: Sequence[T]) -> T:
        """One of ``items``, all equally likely."""
        return items[int(self._generator.random() * len(items))]

    def weighted(self, weights: dict[T, float]) -> T:
        """A key of ``weights``, as likely as its value says (the values sum to 1)."""
        mark = float(self._generator.random())
        for item, weight in weights.items():
            mark -= weight
            if mark < 0:
                return item
        return item

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in a random order."""
        marks = self._generator.random(len(items))
        return [items[i] for i in np.argsort(marks, kind="stable")]


def sample_scene(seed: int, index: int) -> Scene:
    """The scene of figure ``index`` of the set ``seed``: a pure function, whatever the size of the picture."""
    dice = Dice("figure", seed, index)
    width, height = dice.weighted(SHAPES)
    aspect = width / height * (1 + dice.uniform(-ASPECT_JITTER, ASPECT_JITTER))
    person = dice.pick(tuple(HAIR_STYLES))
    top, trousers = dice.pick(tuple(TOP_COLOURS)), dice.pick(tuple(TROUSERS_COLOURS))
    looks = {
        "aspect": aspect,
        "person": person,
        "build": dice.pick(tuple(BUILDS)),
        "skin": dice.pick(tuple(SKIN_COLOURS)),
        "hair": dice.pick(tuple(HAIR_COLOURS)),
        "hair_style": dice.pick(HAIR_STYLES[person]),
        "top": top,
        "top_style": dice.pick(TOP_STYLES),
        "trousers": trousers,
        "background": dice.pick(tuple(BACKGROUND_COLOURS)),
        "light": dice.pick(LIGHTS),
        "held_colour": dice.pick([c for c in TOP_COLOURS if c not in (top, trousers)]),
    }
    for _ in range(5000):  # about one try in square pictures, 15 in the narrowest
        scene = _place(dice, _sample_pose(dice, looks))
        if scene is not None:
            return scene
    raise AssertionError(f"no pose fits figure {index} of seed {seed} into aspect {aspect:.3f}")


def _sample_pose(dice: Dice, looks: dict) -> Scene:
    """A scene in figure heights, its pelvis at the origin."""
    hand = dice.pick(("left", "right"))
    thing = dice.pick(tuple(OBJECTS))
    arms = {hand: dice.pick(OBJECTS[thing]), _other(hand): dice.pick(FREE_ARM_POSES)}
    legs, leading = dice.weighted(LEG_SHARES), dice.pick(("left", "right"))
    gaze = dice.weighted({"ahead": 0.5, "left": 0.25, "right": 0.25})
    lean = math.radians(dice.uniform(-6, 6))
    tilt = lean + math.radians(dice.uniform(-9, 9))
    turn = {"ahead": 0, "left": 1, "right": -1}[gaze] * dice.uniform(0.6, 1.0)
    stout = BUILDS[looks["build"]]

    up = _direction(math.pi - lean)  # directions count from straight down, towards the right of the picture
    across = np.array([-up[1], up[0]])
    neck = up * TORSO
    points = {"pelvis": np.zeros(2), "neck": neck, "head": neck + up * NECK * 0.5 + _direction(math.pi - tilt) * 0.118}
    for side, sign in (("left", 1), ("right", -1)):
        shoulder = neck + sign * across * SHOULDER * stout - up * 0.006
        angles = [math.radians(dice.uniform(*span)) for span in ARM_POSES[arms[side]]]
        elbow = shoulder + _direction(sign * angles[0]) * UPPER_ARM
        wrist = elbow + _direction(sign * angles[1]) * FOREARM
        if arms[side] == "hip":  # the hand lies flat on the hip, fingers downwards
            finger = wrist + _direction(sign * math.radians(-12)) * HAND
        else:
            finger = wrist + _direction(sign * (angles[1] + math.radians(dice.uniform(-8, 8)))) * HAND
        points |= {
            f"{side}_shoulder": shoulder,
            f"{side}_elbow": elbow,
            f"{side}_wrist": wrist,
            f"{side}_finger": finger,
        }
    spans = LEG_POSES[legs]
    for side, sign in (("left", 1), ("right", -1)):
        thigh, shin = spans[:2] if side == leading else spans[2:]
        hip = sign * across * HIP * stout
        length = FORESHORTENED_THIGH if legs == "sitting" else THIGH
        knee = hip + _direction(sign * math.radians(dice.uniform(*thigh))) * length
        shin_angle = sign * math.radians(dice.uniform(*shin))
        ankle = knee + _direction(shin_angle) * SHIN
        points |= {f"{side}_hip": hip, f"{side}_knee": knee, f"{side}_ankle": ankle}
        points |= _foot(side, sign, ankle, shin_angle, legs, leading)
    soles = max(points[f"{side}_{part}"][1] for side in ("left", "right") for part in ("big_toe", "heel")) + 0.008
    return Scene(
        **looks,
        held_object=thing,
        held_hand=hand,
        left_arm=arms["left"],
        right_arm=arms["right"],
        legs=legs,
        leading_leg=leading,
        gaze=gaze,
        framing="full",
        placement="centre",
        unit=1.0,
        tilt=tilt,
        turn=turn,
        ground=soles + (dice.uniform(0.05, 0.09) if legs == "jumping" else 0.0),
        points=points,
    )


def _foot(side: str, sign: int, ankle: np.ndarray, shin: float, legs: str, leading: str) -> dict[str, np.ndarray]:
    """Toes and heel: the foot points outwards, or where the figure walks, and follows the shin when off the ground."""
    towards = (1 if leading == "left" else -1) if legs == "walking" else sign
    turn = shin * (0.7 if abs(shin) > math.radians(6) else 0.0)
    down, aside = _direction(turn), towards * _direction(turn + math.pi / 2)
    return {
        f"{side}_big_toe": ankle + down * 0.036 + aside * 0.05,
        f"{side}_small_toe": ankle + down * 0.030 + aside * 0.056,
        f"{side}_heel": ankle + down * 0.034 - aside * 0.018,
    }


def _place(dice: Dice, scene: Scene) -> Scene | None:
    """Scale and move a posed figure into the picture, or None when it does not fit well."""
    if _covers_something_judged(scene):
        return None
    left, top, right, bottom = union_box([*body_circles(scene), *object_circles(scene)])
    head_top = scene.points["head"][1] - HEAD_RADIUS - HAIR_RISE
    wide = scene.aspect > 1.2
    closer = scene.legs in ("straight", "apart", "walking") and dice.uniform(0, 1) < (0.8 if wide else 0.35)
    room = 1 - 2 * MARGIN
    widest = scene.aspect * room / (right - left)
    if closer:  # the picture ends between knees and ankles
        knees = max(scene.points[f"{side}_knee"][1] for side in ("left", "right"))
        cut = knees + dice.uniform(0.075, 0.11)
        unit = min((1 - MARGIN) / (cut - top), widest)
        origin_y = 1 - cut * unit
        smallest = 0.97
    else:
        height = scene.ground - head_top
        unit = min(dice.uniform(0.84, 0.94) / height, room / (max(bottom, scene.ground) - top), widest)
        spare = 1 - unit * (max(bottom, scene.ground) - top)
        origin_y = spare * dice.uniform(0.35, 0.65) - top * unit
        smallest = 0.8 / max(height, 0.93)
    if unit < smallest:
        return None
    spare = scene.aspect * room - unit * (right - left)
    shift = dice.uniform(0, 1)
    origin_x = scene.aspect * MARGIN - left * unit + spare * shift
    origin = np.array([origin_x, origin_y])
    centre = origin_x / scene.aspect
    moved = {
        "framing": "closer" if closer else "full",
        "placement": "left" if centre < 0.42 else "right" if centre > 0.58 else "centre",
        "unit": unit,
        "ground": scene.ground * unit + origin_y,
        "points": {name: point * unit + origin for name, point in scene.points.items()},
    }
    placed = Scene(**{f.name: getattr(scene, f.name) for f in fields(scene)} | moved)
    return placed if _joints_clear_of_border(placed) else None


def _joints_clear_of_border(scene: Scene) -> bool:
    """Whether every body joint is either well inside the picture or wholly outside."""
    for name, point in scene.points.items():
        x, y = point[0] / scene.aspect, point[1]
        inside = MARGIN <= x <= 1 - MARGIN and MARGIN <= y <= 1 - MARGIN
        outside = not (-0.005 < x < 1.005 and -0.005 < y < 1.005)
        if not (inside or outside) and not name.endswith(("toe", "heel")):
            return False
    return True


def _covers_something_judged(scene: Scene) -> bool:
    """Whether the held object hides the face, the middle of the top or a thigh."""
    p = scene.points
    spots = [(p["head"], HEAD_RADIUS * 0.8), (p["neck"] * 0.5, 0.07)]
    spots += [((p[f"{side}_hip"] + p[f"{side}_knee"]) / 2, 0.03) for side in ("left", "right")]
    return any(
        np.hypot(*(centre - spot)) < radius + clearance
        for centre, radius in object_circles(scene)
        for spot, clearance in spots
    )


def union_box(circles: Sequence[tuple[np.ndarray, float]]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the smallest box round all circles (centre, radius)."""
    centres = np.array([centre for centre, _ in circles])
    radii = np.array([radius for _, radius in circles])[:, None]
    return (*(centres - radii).min(0).tolist(), *(centres + radii).max(0).tolist())


def body_circles(scene: Scene) -> list[tuple[np.ndarray, float]]:
    """Circles that together span the drawn person: the basis of its box and of its place in the picture."""
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


# Circles (centre, radius) in head radii, head frame, that bound each hair style beyond the common cap.
HAIR_OUTLINE = {
    "short": (((0, -0.2), 1.0),),
    "long": (((0, -0.2), 1.0), ((-0.85, 1.6), 0.3), ((0.85, 1.6), 0.3)),
    "bun": (((0, -1.38), 0.4),),
    "curly": (((0, -0.25), 1.28),),
    "pigtails": (((-1.3, 0.45), 0.45), ((1.3, 0.45), 0.45)),
}


def object_circles(scene: Scene) -> list[tuple[np.ndarray, float]]:
    """Circles (centre, radius) that bound the held object."""
    grip, u = object_grip(scene), scene.unit
    outward = 1 if scene.held_hand == "left" else -1

    def at(x: float, y: float) -> np.ndarray:
        return grip + np.array([x * outward, y]) * u

    if scene.held_object == "ball":
        return [(ball_centre(scene), 0.066 * u)]
    if scene.held_object == "balloon":
        return [(at(0.04, -0.25), 0.088 * u), (at(0.04, -0.265), 0.088 * u)]
    if scene.held_object == "book":
        return [(at(0.02, y), 0.075 * u) for y in (-0.035, 0.035)]
    if scene.held_object == "cup":
        return [(at(0.012, -0.018), 0.062 * u)]
    if scene.held_object == "flag":
        return [(at(x, y), 0.06 * u) for x in (0.06, 0.12) for y in (-0.195, -0.15)]
    return [(at(x, -0.2), 0.035 * u) for x in (-0.13, 0.17)] + [(at(0.02, -0.255), 0.07 * u)]


def object_grip(scene: Scene) -> np.ndarray:
    """The middle of the holding hand."""
    side = scene.held_hand
    return scene.points[f"{side}_wrist"] * 0.4 + scene.points[f"{side}_finger"] * 0.6


def ball_centre(scene: Scene) -> np.ndarray:
    """A ball lies against the fingers."""
    wrist, finger = (scene.points[f"{scene.held_hand}_{part}"] for part in ("wrist", "finger"))
    return finger + (finger - wrist) / np.hypot(*(finger - wrist)) * 0.036 * scene.unit


def head_point(scene: Scene, u: float, v: float) -> np.ndarray:
    """A point of the head frame (in head radii, u to the right of the picture, v towards the chin) in the picture."""
    cos, sin = math.cos(scene.tilt), math.sin(scene.tilt)
    return scene.points["head"] + HEAD_RADIUS * scene.unit * np.array([u * cos - v * sin, u * sin + v * cos])


def _direction(angle: float) -> np.ndarray:
    """Unit vector at ``angle`` radians from straight down, towards the right of the picture."""
    return np.array([math.sin(angle), math.cos(angle)])


def _other(side: str) -> str:
    return "right" if side == "left" else "left"
