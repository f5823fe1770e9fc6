"""The colours of a figure's garments, hair and background, judged at the joints found in the picture.

The judge takes the median colour inside each garment and names the nearest palette colour under any of the lights that
figures are drawn in. It never sees the truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluate.records import ATTRIBUTES
from prep.figures.figures import BACKGROUND_COLOURS, HAIR_COLOURS, TOP_COLOURS, TROUSERS_COLOURS

PALETTES = {
    "top": TOP_COLOURS,
    "trousers": TROUSERS_COLOURS,
    "background": BACKGROUND_COLOURS,
    "hair": HAIR_COLOURS,
}
CHANCE = {name: 1 / len(PALETTES[name]) for name in ATTRIBUTES}
# COCO body joints
SHOULDERS, HIPS, KNEES = (5, 6), (11, 12), (13, 14)
ARMS, LEGS = ((5, 7), (7, 9), (6, 8), (8, 10)), ((11, 13), (13, 15), (12, 14), (14, 16))
LIMBS = (*ARMS, *LEGS, (5, 6), (11, 12), (5, 11), (6, 12), (3, 4))
# In head radii, x + iy, from the head's centre: nose, left eye, right eye, left ear, right ear; and the middle of the
# cap of hair above the forehead, which every hair style has.
HEAD = np.array([0.35j, 0.36 + 0.1j, -0.36 + 0.1j, 0.93 + 0.14j, -0.93 + 0.14j])
CROWN = (np.linspace(-0.4, 0.4, 7)[:, None] + 1j * np.linspace(-0.98, -0.62, 5)).ravel()
LIGHTS = np.linspace(0.72, 1.06, 8)  # figures are lit by a field of .76 to 1.04
CLEARANCE = 0.45  # background begins this far from every limb, in shoulder-to-hip lengths: beyond head and hair


def judge_colours(pixels: np.ndarray, joints: np.ndarray) -> dict[str, str | None]:
    """Name the colours of a figure's top, trousers, background and hair.

    ``pixels`` uint8 (H, W, 3); ``joints`` float (17 or more, 3) of x, y in pixels (centres at + .5) and confidence, as
    detected in this picture; a confidence of 0 is a joint that was not found. Returns a palette name for every
    attribute, None where the joints that lead to it were not found.
    """
    regions = {
        "top": _torso(joints),
        "trousers": _thighs(joints),
        "background": _surroundings(joints, pixels.shape[1], pixels.shape[0]),
        "hair": _crown(joints),
    }
    return {
        name: None if points is None else nearest_colour(_median_colour(pixels, points), PALETTES[name])
        for name, points in regions.items()
    }


def score_colours(
    pictures: np.ndarray, joints: Sequence[np.ndarray | None], truths: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the columns ``NAME_true`` and ``NAME_judged`` of each picture, uint8 (B, H, W, 3).

    ``joints`` holds what was detected in each, None where no figure was found: nothing is judged then.
    """
    rows = []
    for picture, found, truth in zip(pictures, joints, truths):
        judged = dict.fromkeys(ATTRIBUTES) if found is None else judge_colours(picture, found)
        row = {f"{name}_true": truth[name] for name in ATTRIBUTES}
        rows.append(row | {f"{name}_judged": judged[name] for name in ATTRIBUTES})
    return rows


def nearest_colour(colour: np.ndarray, palette: Mapping[str, tuple[int, int, int]]) -> str:
    """Return the palette name nearest to an sRGB ``colour`` (3,) in CIELAB, in any light of LIGHTS."""
    names = list(palette)
    lit = np.array([palette[name] for name in names])[:, None] * LIGHTS[:, None]  # (names, lights, 3)
    distance = np.linalg.norm(to_lab(np.clip(lit, 0, 255)) - to_lab(np.asarray(colour, np.float64)), axis=-1)
    return names[int(distance.min(1).argmin())]


def to_lab(srgb: np.ndarray) -> np.ndarray:
    """Convert sRGB in [0, 255] to CIELAB under D65, (..., 3) to (..., 3). IEC 61966-2-1 and CIE 15."""
    encoded = srgb / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ (matrix / matrix.sum(1, keepdims=True)).T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def _grid(origin: np.ndarray, first: np.ndarray, second: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the points ``origin + a first + b second`` for all a and b: (len(a) * len(b), 2)."""
    return (origin + a[:, None, None] * first + b[None, :, None] * second).reshape(-1, 2)


def _torso(joints: np.ndarray) -> np.ndarray | None:
    """Return the points well inside the quadrilateral of shoulders and hips."""
    if not _found(joints, SHOULDERS + HIPS):
        return None
    shoulders, hips = joints[list(SHOULDERS), :2], joints[list(HIPS), :2]
    down = hips.mean(0) - shoulders.mean(0)
    across = (shoulders[0] - shoulders[1] + hips[0] - hips[1]) / 2
    return _grid(shoulders.mean(0), down, across, np.linspace(0.25, 0.85, 9), np.linspace(-0.35, 0.35, 7))


def _thighs(joints: np.ndarray) -> np.ndarray | None:
    """Return the points along the middle of the thighs, from below the top's hem to above the knee."""
    along = np.linspace(0.3, 0.95, 12)[:, None]
    sides = [pair for pair in zip(HIPS, KNEES) if _found(joints, pair)]
    if not sides:
        return None
    return np.concatenate([joints[hip, :2] + along * (joints[knee, :2] - joints[hip, :2]) for hip, knee in sides])


def _crown(joints: np.ndarray) -> np.ndarray | None:
    """Return the points on top of the head, above the forehead.

    The head's place, size and tilt are the similarity that best maps HEAD onto the joints found (least squares in the
    complex plane): one joint that is a pixel off hardly moves it.
    """
    used = np.flatnonzero(joints[: len(HEAD), 2] > 0)
    if len(used) < 3:
        return None
    found, model = joints[used, 0] + 1j * joints[used, 1], HEAD[used]
    centred = model - model.mean()
    turn_and_scale = np.vdot(centred, found) / np.vdot(centred, centred)
    crown = found.mean() + turn_and_scale * (CROWN - model.mean())
    return np.stack([crown.real, crown.imag], axis=1)


def _surroundings(joints: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """Return the centres of all pixels far from every limb, or the farthest tenth of them."""
    if not _found(joints, SHOULDERS + HIPS):
        return None
    y, x = np.mgrid[:height, :width] + 0.5
    points = np.stack([x.ravel(), y.ravel()], axis=1)
    nearest = np.full(len(points), np.inf)
    for start, end in (limb for limb in LIMBS if _found(joints, limb)):
        a, b = joints[start, :2], joints[end, :2]
        span = b - a
        along = np.clip((points - a) @ span / max(span @ span, 1e-9), 0, 1)
        nearest = np.minimum(nearest, np.hypot(*(points - a - along[:, None] * span).T))
    torso = np.hypot(*(joints[list(SHOULDERS), :2].mean(0) - joints[list(HIPS), :2].mean(0)))
    limit = min(CLEARANCE * torso, np.quantile(nearest, 0.9))
    return points[nearest >= limit]


def _found(joints: np.ndarray, names: Sequence[int]) -> bool:
    return bool((joints[list(names), 2] > 0).all())


def _median_colour(pixels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the median sRGB colour (3,) at the points (n, 2), moved into the picture where they lie outside."""
    height, width = pixels.shape[:2]
    x = np.clip(np.floor(points[:, 0]), 0, width - 1).astype(int)
    y = np.clip(np.floor(points[:, 1]), 0, height - 1).astype(int)
    return np.median(pixels[y, x], axis=0)
