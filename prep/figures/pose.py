"""The sampling of figure scenes: who, in which colours, in which pose, and where in the picture."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from prep.figures.scene import (
    BACKGROUND_COLOURS,
    BUILDS,
    HAIR_COLOURS,
    HAIR_STYLES,
    HEAD_RADIUS,
    LIGHTS,
    OBJECTS,
    SKIN_COLOURS,
    TOP_COLOURS,
    TOP_STYLES,
    TROUSERS_COLOURS,
    Dice,
    Scene,
    body_circles,
    object_circles,
    union_box,
)

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
# Visible joints stay this far from each border, as a fraction of that side. Buckets of small bases have rounded sides
# (88x48 stands for 1344x704, 4 % narrower), so a centre crop may take 3 % of either end.
MARGIN = 0.035

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
HELD_ARM_POSES = {
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
HAIR_RISE = 0.018  # of the hair above the head
NECK, NECK_TO_HEAD = 0.022, 0.118
TORSO, SHOULDER, HIP = 0.265, 0.098, 0.06
UPPER_ARM, FOREARM, HAND = 0.148, 0.136, 0.058
THIGH, SHIN = 0.205, 0.2
FORESHORTENED_THIGH = 0.11  # a sitting figure's thighs point at the viewer


def sample_scene(seed: int, index: int) -> Scene:
    """Return the scene of figure ``index`` of the set ``seed``: a pure function, whatever the size of the picture."""
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
    """Return a scene in figure heights, its pelvis at the origin."""
    hand = dice.pick(("left", "right"))
    thing = dice.pick(OBJECTS)
    arms = {hand: dice.pick(HELD_ARM_POSES[thing]), _other(hand): dice.pick(FREE_ARM_POSES)}
    legs, leading = dice.weighted(LEG_SHARES), dice.pick(("left", "right"))
    gaze = dice.weighted({"ahead": 0.5, "left": 0.25, "right": 0.25})
    lean = math.radians(dice.uniform(-6, 6))
    tilt = lean + math.radians(dice.uniform(-9, 9))
    turn = {"ahead": 0, "left": 1, "right": -1}[gaze] * dice.uniform(0.6, 1.0)
    stout = BUILDS[looks["build"]]

    up = _direction(math.pi - lean)  # directions count from straight down, towards the right of the picture
    across = np.array([-up[1], up[0]])
    neck = up * TORSO
    head = neck + up * NECK + _direction(math.pi - tilt) * NECK_TO_HEAD
    points = {"pelvis": np.zeros(2), "neck": neck, "head": head}
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
    """Return toes and heel: a foot points outwards, or where the figure walks, and follows the shin off the ground."""
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
    origin_x = scene.aspect * MARGIN + spare * dice.uniform(0, 1) - left * unit
    origin = np.array([origin_x, origin_y])
    centre = origin_x / scene.aspect
    placed = replace(
        scene,
        framing="closer" if closer else "full",
        placement="left" if centre < 0.42 else "right" if centre > 0.58 else "centre",
        unit=unit,
        ground=scene.ground * unit + origin_y,
        points={name: point * unit + origin for name, point in scene.points.items()},
    )
    return placed if _joints_clear_of_border(placed) else None


def _joints_clear_of_border(scene: Scene) -> bool:
    """Tell whether every body joint is either well inside the picture or wholly outside."""
    for name, point in scene.points.items():
        x, y = point[0] / scene.aspect, point[1]
        inside = MARGIN <= x <= 1 - MARGIN and MARGIN <= y <= 1 - MARGIN
        outside = not (-0.005 < x < 1.005 and -0.005 < y < 1.005)
        if not (inside or outside) and not name.endswith(("toe", "heel")):
            return False
    return True


def _covers_something_judged(scene: Scene) -> bool:
    """Tell whether the held object hides the face, the middle of the top or a thigh."""
    p = scene.points
    spots = [(p["head"], HEAD_RADIUS * 0.8), (p["neck"] * 0.5, 0.07)]
    spots += [((p[f"{side}_hip"] + p[f"{side}_knee"]) / 2, 0.03) for side in ("left", "right")]
    return any(
        np.hypot(*(centre - spot)) < radius + clearance
        for centre, radius in object_circles(scene)
        for spot, clearance in spots
    )


def _direction(angle: float) -> np.ndarray:
    """Return the unit vector at ``angle`` radians from straight down, towards the right of the picture."""
    return np.array([math.sin(angle), math.cos(angle)])


def _other(side: str) -> str:
    return "right" if side == "left" else "left"
