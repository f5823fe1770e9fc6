"""Where a figure's garments are on a coarse grid over a picture, and which cells of it two pictures have in common."""

from __future__ import annotations

import math

import numpy as np

from evaluate.metrics.colours import ARMS, HIPS, LEGS, SHOULDERS

UNCHANGED = 0.05  # of the range of colours: a cell of the grid that differs by less stays as it was

# Limbs along which a part of a figure lies, and how far from them it reaches, in lengths from shoulders to hips
_TRUNK = (SHOULDERS, HIPS, (5, 11), (6, 12), (5, 12), (6, 11))
_REGIONS = {"top": ((*_TRUNK, *ARMS), 0.3), "trousers": ((HIPS, *LEGS), 0.3)}
_HEAD, _HAIR_REACH = (0, 1, 2, 3, 4), 0.85


def garment(joints: np.ndarray, attribute: str, width: int, height: int, side: int) -> np.ndarray | None:
    """Return which cells of a ``side`` x ``side`` grid over a picture hold some of a figure's part, bool (side, side).

    ``joints`` float (17, 3) of x, y in pixels and confidence, ``attribute`` one of top, trousers, background, hair.
    None where the joints that lead to it were not found.
    """
    trunk = joints[[*SHOULDERS, *HIPS]]
    if not (trunk[:, 2] > 0).all():
        return None
    torso = float(np.hypot(*(trunk[:2, :2].mean(0) - trunk[2:, :2].mean(0))))
    cell = np.array([width, height]) / side
    centres = (np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1) + 0.5) * cell  # (row, column, xy)
    margin = float(np.hypot(*cell)) / 2
    if attribute == "hair":
        head = [joint for joint in _HEAD if joints[joint, 2] > 0]
        if not head:
            return None
        centre = joints[head, :2].mean(0)
        return np.linalg.norm(centres - centre, axis=-1) <= _HAIR_REACH * torso + margin
    if attribute == "background":  # all but what is certainly the figure: the middle of its trunk
        half = min(np.hypot(*(side[0] - side[1])) for side in (trunk[:2, :2], trunk[2:, :2])) / 2
        return _distance(centres, trunk[:2, :2].mean(0), trunk[2:, :2].mean(0)) > half - margin
    limbs, reach = _REGIONS[attribute]
    limbs = [limb for limb in limbs if (joints[list(limb), 2] > 0).all()]
    near = np.min([_distance(centres, joints[a, :2], joints[b, :2]) for a, b in limbs], axis=0)
    return near <= reach * torso + margin


def _distance(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return the distance of points (..., 2) from the line between two."""
    span = end - start
    along = np.clip((points - start) @ span / max(span @ span, 1e-9), 0, 1)
    return np.linalg.norm(points - start - along[..., None] * span, axis=-1)


def unchanged(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return which cells of two pictures' mean colours (side * side * 3,) in [0, 1] are the same: bool (side, side)."""
    side = math.isqrt(len(before) // 3)
    difference = (after.astype(np.float64) - before).reshape(side, side, 3)
    return np.sqrt(np.square(difference).mean(-1)) <= UNCHANGED
