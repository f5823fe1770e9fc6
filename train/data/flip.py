"""The mirror image of a sample, as pure functions, and which images of a step are mirrored.

A sample is mirrored as a whole: pixels and pose by the functions here, the caption and its T5 features by what ``prep``
stored of the flipped caption (``prep/captions/mirror.py``), DINO's features by those that it stored of the mirrored
crop: what the network sees in a mirrored image is not what it saw, mirrored (``docs/measurements.md``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nanodit.errors import ConfigError
from nanodit.keypoints import JOINTS
from nanodit.rng import generator


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


def draw_flip(seed: int, step: int, image: int, probability: float) -> bool:
    """Whether image number ``image`` of an optimiser step is to be mirrored, if its caption allows it."""
    return bool(generator(seed, "flip", step, image).random() < probability)


def check_flips(dataset: Any, probability: float) -> None:
    """Raise :class:`ConfigError` where images are to be mirrored, and the dataset lacks what belongs to the mirror."""
    if probability > 0 and not dataset.has_flips:
        raise ConfigError(
            f"data.flip is {probability:g}, but {dataset.root} was prepared without flips: mirrored images need their "
            "own captions and features. Run nanodit prep run on it with flips=true, or set data.flip=0"
        )
