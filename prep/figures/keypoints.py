"""The 133 keypoints of a figure, in the COCO-WholeBody order that DWPose uses.

17 body joints, 6 foot points, 68 face points (the iBUG order), 21 points of the left hand and 21 of the right.
Source: Jin et al., "Whole-Body Human Pose Estimation in the Wild", 2020; https://github.com/jin-s13/COCO-WholeBody.
"""

from __future__ import annotations

import math

import numpy as np

from nanodit.keypoints import JOINTS
from prep.figures.scene import HAIR_OVER_EARS, Scene, head_point, object_circles

BODY = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear"),
    *("left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist"),
    *("left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle"),
)
FEET = ("left_big_toe", "left_small_toe", "left_heel", "right_big_toe", "right_small_toe", "right_heel")
FACE = slice(23, 91)
LEFT_HAND, RIGHT_HAND = slice(91, 112), slice(112, 133)

HIDDEN, VISIBLE = 1, 2  # 0 stands for outside the picture

# Thumb to little finger: angle from the middle finger (degrees, towards the thumb), start and length (in hand lengths).
_FINGERS = ((52, 0.22, 0.52), (15, 0.5, 0.42), (2, 0.52, 0.48), (-11, 0.5, 0.43), (-25, 0.46, 0.34))


def scene_keypoints(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Return positions (133, 2) in the scene's relative coordinates and visibility (133,): 1 hidden, 2 in view.

    Joints of the body are where the drawing puts its limbs' axes; being under clothes is being in view, as in COCO.
    Ears are hidden by hair that covers them, other points by a ball, balloon or book in front of them.
    """
    face = face_points(scene)
    points = dict(scene.points)
    points["nose"] = face[30]
    points["right_eye"], points["left_eye"] = face[36:42].mean(0), face[42:48].mean(0)
    points["left_ear"], points["right_ear"] = (head_point(scene, sign * 0.93, 0.14) for sign in (1, -1))
    positions = np.concatenate(
        [
            np.array([points[name] for name in BODY]),
            np.array([points[name] for name in FEET]),
            face,
            hand_points(scene, "left"),
            hand_points(scene, "right"),
        ]
    )
    visibility = np.full(JOINTS, VISIBLE)
    if scene.hair_style in HAIR_OVER_EARS:
        visibility[[3, 4]] = HIDDEN
    if scene.held_object in ("ball", "balloon", "book"):
        for centre, radius in object_circles(scene):
            visibility[np.hypot(*(positions - centre).T) < radius] = HIDDEN
    return positions, visibility


def face_points(scene: Scene) -> np.ndarray:
    """Return the 68 face points (68, 2): jaw from the figure's right ear to its left, brows, nose, eyes, mouth."""
    shift = 0.16 * scene.turn

    def arc(centre: float, middle: float, half: float, rise: float, count: int, start: float = -1, end: float = 1):
        s = np.linspace(start, end, count)
        return [(centre + half * x, middle + rise * (1 - x * x)) for x in s]

    jaw_angles = np.linspace(math.pi, 0, 17)
    outline = [(0.9 * math.cos(a), 0.1 + 0.88 * math.sin(a)) for a in jaw_angles]
    features = [*arc(-0.38, -0.2, 0.2, -0.07, 5), *arc(0.38, -0.2, 0.2, -0.07, 5)]
    features += [(0, 0.08), (0, 0.17), (0, 0.26), (0, 0.35)]
    features += [(-0.12, 0.41), (-0.06, 0.43), (0, 0.44), (0.06, 0.43), (0.12, 0.41)]
    for side in (-1, 1):
        centre = side * 0.36
        features += [(centre + dx, 0.1 + dy) for dx, dy in ((-0.12, 0), (-0.05, -0.13), (0.05, -0.13))]
        features += [(centre + dx, 0.1 + dy) for dx, dy in ((0.12, 0), (0.05, 0.13), (-0.05, 0.13))]
    features += [*arc(0, 0.56, 0.34, 0.05, 7), *arc(0, 0.56, 0.34, 0.26, 7)[-2:0:-1]]
    features += [*arc(0, 0.57, 0.26, 0.06, 5), *arc(0, 0.57, 0.26, 0.14, 5)[-2:0:-1]]
    local = outline + [(u + shift, v) for u, v in features]
    return np.array([head_point(scene, u, v) for u, v in local])


def hand_points(scene: Scene, side: str) -> np.ndarray:
    """Return the wrist, then four points of the thumb, index, middle, ring and little finger (21, 2)."""
    wrist, finger = scene.points[f"{side}_wrist"], scene.points[f"{side}_finger"]
    along = finger - wrist
    # the thumb is towards the body when the arm hangs and towards the head when it is raised
    inward = -1 if side == "left" else 1
    across = inward * np.array([along[1], -along[0]])
    curl = 0.55 if side == scene.held_hand else 1.0
    points = [wrist]
    for angle, start, length in _FINGERS:
        radians = math.radians(angle)
        direction = along * math.cos(radians) + across * math.sin(radians)
        base = wrist + direction * start
        points += [base + direction * length * curl * step / 3 for step in range(4)]
    return np.array(points)
