"""The drawing of a figure scene: flat, friendly vector art with outlines, supersampled with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from prep.figures.canvas import Canvas, capsule, ellipse, mix, outline_colour, rotation, shade, smooth
from prep.figures.keypoints import FACE, LEFT_HAND, RIGHT_HAND
from prep.figures.scene import (
    BACKGROUND_COLOURS,
    HAIR_COLOURS,
    HAIR_OVER_EARS,
    HEAD_RADIUS,
    SKIN_COLOURS,
    TOP_COLOURS,
    TROUSERS_COLOURS,
    Scene,
    ball_centre,
    head_point,
    object_grip,
)

Pair = tuple[float, float]

WOOD, SHOE, INK, LIPS, WHITE = (150, 104, 62), (70, 54, 52), (40, 30, 32), (196, 62, 70), (255, 255, 255)
STRING, PAPER = (110, 110, 116), (244, 240, 228)


def render(scene: Scene, width: int, height: int) -> Image.Image:
    """Draw ``scene`` as an RGB picture of ``width`` x ``height`` pixels, antialiased by supersampling."""
    factor = 3 if width * height > 256 * 256 else 4
    canvas = Canvas(scene, width * factor, height * factor)
    _draw_room(canvas)
    _draw_behind(canvas)
    _draw_legs(canvas)
    _draw_torso(canvas)
    for side in ("left", "right"):
        _draw_arm(canvas, side)
    _draw_head(canvas)
    _draw_hair(canvas)
    _draw_object(canvas)
    return _lit(canvas.image.reduce(factor), scene.light)


def _lit(image: Image.Image, source: str) -> Image.Image:
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


def _draw_room(canvas: Canvas) -> None:
    """Draw the floor and the shadow under the figure; the wall is the canvas itself."""
    scene, wall = canvas.scene, BACKGROUND_COLOURS[canvas.scene.background]
    horizon = scene.ground - 0.055 * scene.unit
    if horizon < 1:
        corners = np.array([(0, horizon), (scene.aspect, horizon), (scene.aspect, 1.01), (0, 1.01)])
        canvas.fill(corners, shade(wall, 0.9))
        canvas.stroke(corners[:2], 0.004, shade(wall, 0.8))
    feet = np.array([scene.points[f"{side}_{part}"] for side in ("left", "right") for part in ("heel", "big_toe")])
    middle, reach = feet[:, 0].mean(), np.ptp(feet[:, 0]) / 2 + 0.05 * scene.unit
    canvas.fill(ellipse(np.array([middle, scene.ground]), reach, 0.022 * scene.unit), shade(wall, 0.74))


def _draw_behind(canvas: Canvas) -> None:
    """Draw what is behind the body: a stool, long hair, a bun, pigtails."""
    scene, u = canvas.scene, canvas.unit
    if scene.legs == "sitting":
        seat = scene.points["pelvis"] + np.array([0, 0.075 * u])
        side = np.array([0.135 * u, 0])
        for sign in (-1, 1):
            foot = np.array([seat[0] + sign * 0.15 * u, scene.ground - 0.012 * u])
            canvas.shapes([capsule(seat + sign * side * 0.85, foot, 0.014 * u, 0.011 * u)], WOOD)
        canvas.shapes([capsule(seat - side, seat + side, 0.024 * u, 0.024 * u)], WOOD)
    hair, radius = HAIR_COLOURS[scene.hair], HEAD_RADIUS * u
    if scene.hair_style == "long":
        half = [(0.6, -1.05), (1.0, -0.6), (1.14, 0.3), (1.18, 1.3), (1.0, 1.6)]
        canvas.shapes([_head_outline(scene, half)], hair)
    elif scene.hair_style == "bun":
        canvas.shapes([ellipse(head_point(scene, 0, -1.36), 0.4 * radius)], hair)
    elif scene.hair_style == "pigtails":
        tails = [
            ellipse(head_point(scene, sign * 1.24, 0.5), 0.32 * radius, 0.6 * radius, scene.tilt - sign * 0.35)
            for sign in (-1, 1)
        ]
        canvas.shapes(tails, hair)
    elif scene.hair_style == "curly":
        curls = [
            ellipse(head_point(scene, 0.98 * math.cos(a), -0.15 + math.sin(a)), 0.34 * radius, count=24)
            for a in np.radians(np.linspace(150, 390, 11))
        ]
        canvas.shapes([*curls, ellipse(head_point(scene, 0, -0.2), 1.05 * radius)], hair)


def _head_outline(scene: Scene, half: Sequence[Pair], rest: Sequence[Pair] = ()) -> np.ndarray:
    """Return a smooth shape in the head frame: ``half`` on the right side, mirrored to the left, then ``rest``."""
    outline = [*half, *((-x, y) for x, y in reversed(half)), *rest]
    return smooth([head_point(scene, *point) for point in outline])


def _draw_legs(canvas: Canvas) -> None:
    p, u, g = canvas.points, canvas.unit, canvas.girth
    cloth = [capsule(p["left_hip"], p["right_hip"], 0.05 * g, 0.05 * g)]
    for side in ("left", "right"):
        hip, knee, ankle, heel, toe = (p[f"{side}_{part}"] for part in ("hip", "knee", "ankle", "heel", "big_toe"))
        canvas.shapes([capsule(heel, toe, 0.02 * u, 0.021 * u), capsule(ankle, heel, 0.022 * u, 0.02 * u)], SHOE)
        cloth.append(capsule(hip, knee, 0.053 * g, 0.044 * g))
        cloth.append(capsule(knee, knee + (ankle - knee) * 1.03, 0.044 * g, 0.038 * g, flat=True))
    canvas.shapes(cloth, TROUSERS_COLOURS[canvas.scene.trousers])


def _torso_point(canvas: Canvas, x: float, y: float) -> np.ndarray:
    """Return a point of the torso's frame: x across (scaled by the build), y up from the pelvis, in figure heights."""
    spine = canvas.points["neck"] - canvas.points["pelvis"]
    up = spine / math.hypot(*spine)
    return canvas.points["pelvis"] + np.array([-up[1], up[0]]) * x * canvas.girth + up * y * canvas.unit


def _draw_torso(canvas: Canvas) -> None:
    """Draw neck and top: a jumper has a ribbed hem, a shirt a collar and buttons, a short-sleeved top a low neck."""
    scene, u = canvas.scene, canvas.unit
    skin, colour = SKIN_COLOURS[scene.skin], TOP_COLOURS[scene.top]
    edge = outline_colour(colour)

    def at(x: float, y: float) -> np.ndarray:
        return _torso_point(canvas, x, y)

    canvas.shapes([capsule(at(0, 0.25), canvas.points["head"], 0.034 * u, 0.034 * u)], shade(skin, 0.9))
    half = [(0.04, 0.283), (0.085, 0.272), (0.122, 0.245), (0.118, 0.19), (0.106, 0.1), (0.108, 0.02), (0.108, -0.03)]
    canvas.shapes([smooth([at(x, y) for x, y in half] + [at(-x, y) for x, y in reversed(half)])], colour)
    if scene.top_style == "shirt":
        canvas.stroke(np.array([at(0, 0.24), at(0, -0.03)]), 0.005 * u, edge)
        for y in (0.2, 0.14, 0.08, 0.02):
            canvas.fill(ellipse(at(0.014, y), 0.006 * u, count=12), edge)
        for sign in (-1, 1):
            canvas.shapes([np.array([at(0, 0.245), at(sign * 0.05, 0.3), at(sign * 0.062, 0.245)])], colour)
        return
    depth = 0.255 if scene.top_style == "jumper" else 0.232
    canvas.fill(smooth([at(-0.045, 0.285), at(0, depth), at(0.045, 0.285), at(0, 0.3)]), shade(skin, 0.9))
    if scene.top_style == "jumper":
        canvas.stroke(np.array([at(-0.1, -0.008), at(0, -0.014), at(0.1, -0.008)]), 0.004 * u, edge)
        for x in np.linspace(-0.085, 0.085, 9):
            canvas.stroke(np.array([at(x, -0.012), at(x, -0.03)]), 0.003 * u, edge)


def _draw_arm(canvas: Canvas, side: str) -> None:
    scene, g, p = canvas.scene, canvas.girth, canvas.points
    skin, colour = SKIN_COLOURS[scene.skin], TOP_COLOURS[scene.top]
    shoulder, elbow, wrist = (p[f"{side}_{part}"] for part in ("shoulder", "elbow", "wrist"))
    _draw_hand(canvas, side)
    if scene.top_style == "top":
        arm = [capsule(shoulder, elbow, 0.029 * g, 0.027 * g), capsule(elbow, wrist, 0.027 * g, 0.022 * g)]
        canvas.shapes(arm, skin)
        canvas.shapes([capsule(shoulder, shoulder + (elbow - shoulder) * 0.7, 0.036 * g, 0.039 * g, flat=True)], colour)
    else:
        cuff = elbow + (wrist - elbow) * 0.98
        sleeve = [capsule(shoulder, elbow, 0.036 * g, 0.032 * g), capsule(elbow, cuff, 0.032 * g, 0.028 * g, flat=True)]
        canvas.shapes(sleeve, colour)
    # sleeve and top are one piece of cloth: wipe the outline between them at the shoulder
    sign = 1 if side == "left" else -1
    canvas.fill(capsule(shoulder, _torso_point(canvas, sign * 0.07, 0.225), 0.03 * g, 0.036 * g), colour)


def _draw_hand(canvas: Canvas, side: str) -> None:
    """Draw a palm and five fingers along the keypoints of the hand."""
    u, skin = canvas.unit, SKIN_COLOURS[canvas.scene.skin]
    hand = canvas.keypoints[LEFT_HAND if side == "left" else RIGHT_HAND]
    palm = hand[0] + (canvas.points[f"{side}_finger"] - hand[0]) * 0.36
    fingers = [capsule(hand[i], hand[i + 3], 0.0092 * u, 0.008 * u) for i in (1, 5, 9, 13, 17)]
    canvas.shapes([capsule(hand[0], palm, 0.019 * u, 0.025 * u), *fingers], skin)


def _draw_head(canvas: Canvas) -> None:
    scene, radius = canvas.scene, HEAD_RADIUS * canvas.unit
    skin, hair, face = SKIN_COLOURS[scene.skin], HAIR_COLOURS[scene.hair], canvas.keypoints[FACE]
    upright = rotation(scene.tilt)
    if scene.hair_style not in HAIR_OVER_EARS:
        ears = [ellipse(head_point(scene, sign * 0.92, 0.14), 0.16 * radius, 0.2 * radius) for sign in (-1, 1)]
        canvas.shapes(ears, skin)
    skull = [head_point(scene, 0.9 * math.cos(a), -0.1 - 0.85 * math.sin(a)) for a in np.linspace(0, math.pi, 12)[1:-1]]
    canvas.shapes([np.concatenate([face[:17], skull])], skin)
    for sign, first in ((-1, 36), (1, 42)):
        eye = face[first : first + 6].mean(0)
        cheek = eye + upright @ np.array([sign * 0.12, 0.34]) * radius
        canvas.fill(ellipse(cheek, 0.13 * radius, 0.09 * radius, scene.tilt, 20), mix(skin, (232, 84, 84), 0.28))
        canvas.fill(ellipse(eye, 0.11 * radius, 0.145 * radius, scene.tilt, 24), INK)
        canvas.fill(ellipse(eye + np.array([0.035, -0.05]) * radius, 0.038 * radius, count=12), WHITE)
        if scene.person == "woman":
            lash = [(sign * 0.08, -0.08), (sign * 0.17, -0.11)]
            canvas.stroke(eye + np.array(lash) * radius @ upright.T, 0.045 * radius, INK)
    for first in (17, 22):
        canvas.stroke(face[first : first + 5], (0.06 if scene.person == "woman" else 0.085) * radius, shade(hair, 0.72))
    canvas.stroke(face[[29, 33]], 0.09 * radius, shade(skin, 0.84))
    canvas.fill(face[48:60], LIPS)
    canvas.fill(face[60:68], WHITE)


def _draw_hair(canvas: Canvas) -> None:
    """Draw the cap of hair round the face, and long locks over the shoulders."""
    scene, hair = canvas.scene, HAIR_COLOURS[canvas.scene.hair]
    low = {"short": 0.0, "curly": 0.28}.get(scene.hair_style, 0.1)
    parting = 0.2 if scene.hair_style in ("short", "long", "pigtails") else 0.0
    outer = [(0, -1.18), (0.45, -1.12), (0.86, -0.85), (1.06, -0.3), (1.0, low)]
    fringe = [(0.86, low), (0.8, -0.25), (0.56, -0.42), (parting + 0.1, -0.52), (parting - 0.1, -0.5), (-0.5, -0.42)]
    fringe += [(-0.8, -0.25), (-0.86, low)]
    left = [(-x, y) for x, y in reversed(outer[1:])]
    canvas.shapes([smooth([head_point(scene, *point) for point in [*outer, *fringe, *left]])], hair)
    if scene.hair_style == "long":
        lock = [
            (0.84, -0.3),
            (1.06, -0.2),
            (1.17, 0.8),
            (1.14, 1.7),
            (0.92, 2.0),
            (0.74, 1.75),
            (0.76, 1.1),
            (0.9, 0.5),
        ]
        for sign in (-1, 1):
            canvas.shapes([smooth([head_point(scene, sign * x, y) for x, y in lock])], hair)


def _draw_object(canvas: Canvas) -> None:
    """Draw the held object, and the fingers over what they grip."""
    scene, u = canvas.scene, canvas.unit
    colour = TOP_COLOURS[scene.held_colour]
    edge, gleam = outline_colour(colour), mix(colour, WHITE, 0.55)
    grip = object_grip(scene)
    outward = 1 if scene.held_hand == "left" else -1

    def at(x: float, y: float) -> np.ndarray:
        return grip + np.array([x * outward, y]) * u

    def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
        return np.array([at(x0, y0), at(x1, y0), at(x1, y1), at(x0, y1)])

    if scene.held_object == "ball":
        centre = ball_centre(scene)
        canvas.shapes([ellipse(centre, 0.062 * u)], colour)
        canvas.fill(ellipse(centre + np.array([-0.02, -0.024]) * u, 0.014 * u, 0.01 * u, -0.7), gleam)
        return
    if scene.held_object == "balloon":
        canvas.stroke(np.array([at(0, 0.03), at(0.01, -0.06), at(0.04, -0.16)]), 0.005 * u, STRING)
        knot = np.array([at(0.026, -0.148), at(0.054, -0.148), at(0.04, -0.17)])
        canvas.shapes([knot, ellipse(at(0.04, -0.257), 0.082 * u, 0.096 * u)], colour)
        canvas.fill(ellipse(at(0.04, -0.257) - np.array([0.03, 0.035]) * u, 0.014 * u, 0.024 * u, 0.5), gleam)
    elif scene.held_object == "book":
        canvas.shapes([box(-0.015, -0.09, 0.115, 0.07)], PAPER, edge)
        canvas.shapes([box(-0.02, -0.09, 0.108, 0.07)], colour)
        canvas.fill(box(0.015, -0.06, 0.08, -0.03), mix(colour, WHITE, 0.7))
    elif scene.held_object == "cup":
        canvas.shapes([ellipse(at(0.07, -0.02), 0.028 * u)], colour)
        canvas.fill(ellipse(at(0.07, -0.02), 0.014 * u), BACKGROUND_COLOURS[scene.background])
        canvas.shapes([np.array([at(-0.02, -0.07), at(0.066, -0.07), at(0.056, 0.04), at(-0.01, 0.04)])], colour)
        canvas.shapes([ellipse(at(0.023, -0.07), 0.043 * u, 0.012 * u)], shade(colour, 0.8), edge)
    elif scene.held_object == "flag":
        canvas.shapes([capsule(at(0, 0.07), at(0, -0.25), 0.007 * u, 0.007 * u)], WOOD)
        wave = [at(0.005 + 0.17 * s, -0.245 + 0.012 * math.sin(6 * s)) for s in np.linspace(0, 1, 9)]
        canvas.shapes([np.array(wave + [point + np.array([0, 0.125 * u]) for point in reversed(wave)])], colour)
    else:
        canvas.shapes([capsule(at(0.02, 0.05), at(0.02, -0.31), 0.007 * u, 0.006 * u)], WOOD)
        dome = [at(0.02 + 0.19 * math.cos(a), -0.19 - 0.125 * math.sin(a)) for a in np.linspace(0, math.pi, 24)]
        hem = [at(-0.17 + 0.38 * s, -0.19 - 0.018 * abs(math.sin(3 * math.pi * s))) for s in np.linspace(0, 1, 25)]
        canvas.shapes([np.array(dome + hem[1:-1])], colour)
        for x in (-0.063, 0.063):
            canvas.stroke(np.array([at(0.02 + x, -0.2), at(0.02 + x * 0.6, -0.28), at(0.02, -0.313)]), 0.004 * u, edge)
    if scene.held_object == "book":
        thumb = capsule(at(-0.025, 0.0), at(0.014, -0.008), 0.011 * u, 0.0095 * u)
        canvas.shapes([thumb], SKIN_COLOURS[scene.skin])
    elif scene.held_object == "cup":
        fingers = [capsule(at(-0.028, y), at(0.012, y), 0.0095 * u, 0.0085 * u) for y in (-0.026, -0.008, 0.01)]
        canvas.shapes(fingers, SKIN_COLOURS[scene.skin])
    else:
        _draw_hand(canvas, scene.held_hand)
