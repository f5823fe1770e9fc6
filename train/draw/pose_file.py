"""Poses as JSON: the joints of one person, in a format of our own or as OpenPose and the DWPose exporters write them.

Ours has COCO-WholeBody's 133 joints (17 body, 6 feet, 68 face, 21 left hand, 21 right hand), left and right as the
person's, x and y in pixels from the left and upper edge of a picture of the size given, confidence 0 where a joint was
not found::

    {"width": 512, "height": 768, "keypoints": [[250.5, 96.0, 0.98], ...]}

OpenPose's has ``people`` with ``pose_keypoints_2d`` of 18 or 25 joints and optional ``face_keypoints_2d`` and
``hand_left_keypoints_2d``, ``hand_right_keypoints_2d``; ControlNet's editors and ComfyUI add ``canvas_width`` and
``canvas_height``, which are needed here, and may write fractions of them instead of pixels. The largest person counts.
Source: github.com/CMU-Perceptual-Computing-Lab/openpose/blob/master/doc/02_output.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanodit.errors import DataError
from nanodit.keypoints import JOINTS
from prep.dataset.buckets import Bucket, centre_crop
from prep.encoders.dwpose import normalise

# number of joints in `pose_keypoints_2d` -> where COCO's 17, then (in BODY_25 alone) the 6 of the feet stand there
OPENPOSE_BODY = {
    18: (0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10),
    25: (0, 16, 15, 18, 17, 5, 2, 6, 3, 7, 4, 12, 9, 13, 10, 14, 11, 19, 20, 21, 22, 23, 24),
}
# first joint here and number of joints; OpenPose's face has the pupils as two more
OPENPOSE_PARTS = {
    "face_keypoints_2d": (23, 68), "hand_left_keypoints_2d": (91, 21), "hand_right_keypoints_2d": (112, 21),
}  # fmt: skip
MAX_BYTES = 1 << 24  # a crowd is less than a tenth of it
LARGEST_FRACTION = 2.0  # coordinates up to here are fractions of the canvas: joints may lie beyond its edge


@dataclass(frozen=True)
class Skeleton:
    """The joints of one person in a picture of ``width`` x ``height`` pixels.

    ``keypoints`` (133, 3) float32: continuous x and y in pixels, and confidence; (0, 0, 0) where there is none.
    """

    keypoints: np.ndarray
    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), as of an image."""
        return self.width, self.height


def read_skeleton(data: bytes, name: str) -> Skeleton:
    """Read a JSON file of one of the two formats; ``name`` is what messages call it. Raises :class:`DataError`."""
    if len(data) > MAX_BYTES:
        raise DataError(f"{name}: not a pose: it has {len(data) / 1e6:.0f} MB, and one person's joints are a few kB")
    try:
        content = json.loads(data)
        if isinstance(content, list) and len(content) == 1:  # ComfyUI saves a list of frames
            (content,) = content
        if not isinstance(content, dict) or not content.keys() & {"keypoints", "people"}:
            raise ValueError("it has neither `keypoints` nor `people`")
        width, height = (_side(content, side) for side in ("width", "height"))
        if "keypoints" in content:
            keypoints = _joints(content["keypoints"], "keypoints", JOINTS)
        else:
            people = [_openpose(person, width, height) for person in content["people"]]
            keypoints = max(people, key=_extent, default=np.zeros((JOINTS, 3)))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{name}: not a pose: {error}. Give COCO-WholeBody's 133 joints as {{width, height, keypoints: [[x, y, "
            "confidence], ...]}}, or what OpenPose and DWPose exporters write, with canvas_width and canvas_height"
        ) from None
    found = keypoints[:, 2:] > 0
    if not found.any():
        raise DataError(f"{name}: holds no joint with a confidence above 0. Leave --pose out, or give another one")
    return Skeleton(np.where(found, keypoints, 0).astype(np.float32), width, height)


def crop_skeleton(skeleton: Skeleton, bucket: Bucket, name: str) -> np.ndarray:
    """Return the joints as ``prep`` stores them for the crop to ``bucket``: (133, 3) float32, x and y in [-1, 1].

    A joint that the crop cuts off is not found, as it would not be in the cropped picture. Raises :class:`DataError`
    where none is left.
    """
    crop = centre_crop(skeleton.width, skeleton.height, bucket)
    places = (skeleton.keypoints[:, :2] - (crop.left, crop.top)) * crop.scale
    inside = ((places >= 0) & (places <= (bucket.width, bucket.height))).all(1, keepdims=True)
    joints = np.where(inside, np.concatenate([places, skeleton.keypoints[:, 2:]], 1), 0)
    if not (joints[:, 2] > 0).any():
        raise DataError(f"{name}: the crop to {bucket} leaves no joint of it. Choose a --size of another shape")
    return normalise(joints, bucket.width, bucket.height)


def _side(content: dict[str, Any], name: str) -> int:
    value = content.get(f"canvas_{name}", content.get(name))
    if not isinstance(value, int | float) or not 1 <= value <= 1 << 20:
        raise ValueError(f"it does not say the {name} of its picture in pixels")
    return round(value)


def _openpose(person: dict[str, Any], width: int, height: int) -> np.ndarray:
    """One of OpenPose's people -> (133, 3) in continuous pixels."""
    keypoints = np.zeros((JOINTS, 3))
    body = _joints(person.get("pose_keypoints_2d") or [0] * 54, "pose_keypoints_2d", *OPENPOSE_BODY)
    order = OPENPOSE_BODY[len(body)]
    keypoints[: len(order)] = body[list(order)]
    for part, (first, count) in OPENPOSE_PARTS.items():
        if person.get(part):
            keypoints[first : first + count] = _joints(person[part], part, count, count + 2)[:count]
    found = keypoints[:, 2] > 0
    # whole numbers are centres of pixels there
    scale = (width, height) if np.abs(keypoints[found, :2]).max(initial=0) <= LARGEST_FRACTION else (1, 1)
    keypoints[found, :2] = keypoints[found, :2] * scale + 0.5
    return keypoints


def _joints(values: Any, name: str, *counts: int) -> np.ndarray:
    """Numbers, flat or in threes, -> (N, 3) float64 with N one of ``counts``."""
    joints = np.asarray(values, np.float64)
    if joints.size % 3 or joints.size // 3 not in counts:
        raise ValueError(f"{name} holds {joints.size} numbers, expected 3 for each of {' or '.join(map(str, counts))}")
    if not np.isfinite(joints).all():
        raise ValueError(f"{name} holds numbers that are not finite")
    return joints.reshape(-1, 3)


def _extent(keypoints: np.ndarray) -> float:
    """Area of the box around the joints found."""
    places = keypoints[keypoints[:, 2] > 0, :2]
    return float(np.prod(np.ptp(places, axis=0))) if len(places) else -1.0
