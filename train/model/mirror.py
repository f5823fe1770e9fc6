"""The mirror images of pixels and joints, as pure functions."""

from __future__ import annotations

import numpy as np

from nanodit.keypoints import JOINTS


def _mirror_pairs() -> list[tuple[int, int]]:
    """Joints that change places: 61 pairs; chin, bridge and tip of the nose and the middles of the lips have none.

    Order and pairs of COCO-WholeBody (Jin et al. 2020; github.com/jin-s13/COCO-WholeBody), as in mmpose's
    ``configs/_base_/datasets/coco_wholebody.py``, key ``swap``; the face is in the iBUG order.
    """
    pairs = [(left, left + 1) for left in range(1, 17, 2)]  # eyes, ears, shoulders, ..., ankles
    pairs += [(toe, toe + 3) for toe in range(17, 20)]  # big toe, small toe, heel
    pairs += [(23 + i, 39 - i) for i in range(8)]  # the jaw from ear to ear; 31 is the chin
    pairs += [(40 + i, 49 - i) for i in range(5)]  # brows
    pairs += [(54, 58), (55, 57)]  # nostrils
    pairs += [(59, 68), (60, 67), (61, 66), (62, 65), (63, 70), (64, 69)]  # eyes: corners, upper and lower lids
    pairs += [(71, 77), (72, 76), (73, 75), (78, 82), (79, 81)]  # the lips' outer line
    pairs += [(83, 87), (84, 86), (88, 90)]  # and inner line
    return pairs + [(91 + i, 112 + i) for i in range(21)]  # hands


def _permutation() -> np.ndarray:
    joints = np.arange(JOINTS)
    for left, right in _mirror_pairs():
        joints[[left, right]] = right, left
    return joints


MIRRORED_JOINTS = _permutation()  # (133,): the joint that each joint is in the mirror


def flip_pixels(pixels: np.ndarray) -> np.ndarray:
    """Mirror an image (H, W, 3), or a patch grid (h, w, D): left columns become right ones."""
    return pixels[:, ::-1]


def flip_pose(pose: np.ndarray) -> np.ndarray:
    """Mirror keypoints (..., 133, 3) of x and y in [-1, 1] and a confidence.

    x is continuous (-1 and 1 are the edges of the crop), so the mirror's is -x exactly. Joints that were not found are
    (0, 0, 0) and stay so, without a negative zero.
    """
    flipped = pose[..., MIRRORED_JOINTS, :]  # a copy
    flipped[..., 0] = 0 - flipped[..., 0]
    return flipped
