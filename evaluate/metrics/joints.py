"""Joints found against joints asked for: PCK and OKS, for the whole body and its parts, as pure functions.

All joints are the 133 of COCO-WholeBody, in its order, as x and y in pixels and a confidence. A joint that was asked
for and not detected is wrong: no hit, similarity 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from evaluate.records import cluster_of
from train.model.mirror import MIRRORED_JOINTS

# of the 133, in the order of COCO-WholeBody: where each part of the body begins and ends
PARTS = {
    "body": slice(0, 17),
    "feet": slice(17, 23),
    "face": slice(23, 91),
    "hands": slice(91, 133),
    "whole": slice(0, 133),
}
# face and each hand are measured by their own box: a tenth of the person's is most of a face
OWN_BOX = (slice(23, 91), slice(91, 112), slice(112, 133))
ALPHA = 0.1  # of the longer side of the box
CONFIDENCE = 0.3
HEADLINE = "body"  # the part that a condition is quoted by
# where the person's box comes from: what the allowance is a part of, so PCKs under the two are not comparable
TRUE_BOX, JOINTS_BOX = "true box", "box around the confident joints that prep found"
# A person's area where only the box is known: what crowdposetools and xtcocotools take (cocoeval.py, computeOks without
# use_area). COCO itself takes the area of the segment.
AREA_OF_BOX = 0.53

# How far apart two people place a joint, as a part of the square root of the person's area. Facts of COCO-WholeBody
# (Jin et al. 2020; github.com/jin-s13/COCO-WholeBody, evaluation/myeval_wholebody.py, computeOks), equal to key
# `sigmas` of mmpose's configs/_base_/datasets/coco_wholebody.py. The body's are COCO's own.
_BODY = [
    0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089,
    0.089,
]  # fmt: skip
_FEET = [0.068, 0.066, 0.066, 0.092, 0.094, 0.094]
_FACE = [
    *(0.042, 0.043, 0.044, 0.043, 0.040, 0.035, 0.031, 0.025, 0.020),  # the jaw to the chin
    *(0.023, 0.029, 0.032, 0.037, 0.038, 0.043, 0.041, 0.045),
    *(0.013, 0.012, 0.011, 0.011, 0.012, 0.012, 0.011, 0.011, 0.013, 0.015),  # brows
    *(0.009, 0.007, 0.007, 0.007, 0.012, 0.009, 0.008, 0.016, 0.010),  # nose
    *(0.017, 0.011, 0.009, 0.011, 0.009, 0.007, 0.013, 0.008, 0.011, 0.012, 0.010, 0.034),  # eyes
    *(0.008, 0.008, 0.009, 0.008, 0.008, 0.007, 0.010, 0.008, 0.009, 0.009),  # lips
    *(0.009, 0.007, 0.007, 0.008, 0.011, 0.008, 0.008, 0.008, 0.010, 0.008),
]
_HAND = [
    *(0.029, 0.022, 0.035, 0.037, 0.047, 0.026, 0.025, 0.024, 0.035, 0.018, 0.024),
    *(0.022, 0.026, 0.017, 0.021, 0.021, 0.032, 0.020, 0.019, 0.022, 0.031),
]
SIGMAS = np.array([*_BODY, *_FEET, *_FACE, *_HAND, *_HAND])  # (133,)


@dataclass(frozen=True)
class Box:
    """A person's box, in pixels: what an error is relative to."""

    width: float
    height: float

    @classmethod
    def around(cls, points: np.ndarray) -> Box:
        """Return the box around points (n, 2), in their unit; empty without points."""
        return cls(*np.ptp(points, axis=0).tolist()) if len(points) else cls(0.0, 0.0)

    @property
    def longer_side(self) -> float:
        """In pixels: what PCK allows a part of."""
        return max(self.width, self.height)

    @property
    def area(self) -> float:
        """The area of the person in it, in square pixels, by AREA_OF_BOX."""
        return AREA_OF_BOX * self.width * self.height


@dataclass(frozen=True)
class Joints:
    """The joints of n pictures against those asked for.

    ``clusters`` in which they are resampled; ``found`` and ``target`` float32 (n, 133, 3) in pixels; ``asked`` and
    ``outside`` bool (n, 133): which joints count, and which do not since they are beyond the edge; ``side`` and
    ``area`` (n,) of the person's box.
    """

    clusters: list[str]
    found: np.ndarray
    target: np.ndarray
    asked: np.ndarray
    outside: np.ndarray
    side: np.ndarray
    area: np.ndarray

    @classmethod
    def read(cls, rows: Sequence[Mapping[str, Any]], mirrored: bool = False) -> Joints:
        """Read rows of samples.parquet that were scored; ``mirrored`` holds them against the mirror image instead."""
        blank = np.zeros(3 * len(SIGMAS), np.float32)
        columns = [[blank if row["joints"] is None else row["joints"] for row in rows]]
        columns += [[row["target_joints"] for row in rows]]
        found, target = (np.array(column, np.float32).reshape(len(rows), len(SIGMAS), 3) for column in columns)
        width, height, side, area = (
            np.array([row[name] for row in rows], np.float64) for name in ("width", "height", "box_side", "box_area")
        )
        if mirrored:
            target = mirror(target, width)
        sure, there = target[..., 2] >= CONFIDENCE, inside(target, width, height)
        asked = sure & there & (side > 0)[:, None]  # a single joint has a box without a side, which allows nothing
        return cls([cluster_of(row) for row in rows], found, target, asked, sure & ~there, side, area)

    @cached_property
    def sides(self) -> np.ndarray:
        """The longer side of the box that each joint's error is relative to, in pixels, float64 (n, 133).

        The person's; of the face and of each hand that around their own joints asked for, which is 0 for a single one.
        """
        sides = np.repeat(self.side[:, None], len(SIGMAS), axis=1)
        for part in OWN_BOX:
            points, asked = self.target[:, part, :2].astype(np.float64), self.asked[:, part, None]
            low = np.where(asked, points, np.inf).min(axis=1)
            high = np.where(asked, points, -np.inf).max(axis=1)
            sides[:, part] = np.maximum(high - low, 0).max(axis=1, keepdims=True)
        return sides

    @cached_property
    def counted(self) -> np.ndarray:
        """Which of the joints asked for have a box to be measured by, bool (n, 133)."""
        return self.asked & (self.sides > 0)

    @cached_property
    def seen(self) -> np.ndarray:
        """Which joints were found, asked for or not, bool (n, 133)."""
        return self.found[..., 2] >= CONFIDENCE

    @cached_property
    def hit(self) -> np.ndarray:
        """Which of the joints that count were met, bool (n, 133)."""
        return self.counted & hits(self.found, self.target, self.sides)

    def oks(self, part: slice) -> np.ndarray:
        """Return OKS of a part of the body (n,); NaN where none of it was asked for."""
        return oks(similarity(self.found, self.target, self.area)[:, part], self.asked[:, part])


def inside(joints: np.ndarray, width: np.ndarray | int, height: np.ndarray | int) -> np.ndarray:
    """Return which joints (..., J, 3) are within a picture of this size (...): bool (..., J)."""
    edges = np.stack([np.asarray(width), np.asarray(height)], axis=-1)[..., None, :]
    return ((joints[..., :2] >= 0) & (joints[..., :2] <= edges)).all(-1)


def hits(found: np.ndarray, target: np.ndarray, longer_side: np.ndarray | float, alpha: float = ALPHA) -> np.ndarray:
    """Return which joints were detected at most ``alpha * longer_side`` from their target: bool (..., J).

    ``found``, ``target``: (..., J, 3); ``longer_side``: of the box, in pixels (...), or of each joint's (..., J). PCK
    is the share of hits among the joints asked for, pooled over people (Yang & Ramanan 2013, "Articulated Human
    Detection with Flexible Mixtures of Parts").
    """
    allowed = alpha * np.asarray(longer_side, np.float64)
    allowed = allowed if allowed.ndim == found.ndim - 1 else allowed[..., None]
    return (found[..., 2] >= CONFIDENCE) & (_distance(found, target) <= allowed)


def similarity(found: np.ndarray, target: np.ndarray, area: np.ndarray | float) -> np.ndarray:
    """Return how near each joint is to its target, from 0 to 1: float64 (..., 133).

    ``exp(-d^2 / (2 area (2 sigma)^2))`` with the distance d, SIGMAS and the person's ``area`` in square pixels (...)
    (COCO's keypoint evaluation, cocodataset.org/#keypoints-eval). COCO counts whatever place is given for a joint; here
    one that was not detected is not similar.
    """
    scale = 2 * (np.asarray(area, np.float64)[..., None] + np.spacing(1)) * (2 * SIGMAS) ** 2  # an empty area: no 0 / 0
    return np.where(found[..., 2] >= CONFIDENCE, np.exp(-(_distance(found, target) ** 2) / scale), 0.0)


def oks(similarities: np.ndarray, asked_for: np.ndarray) -> np.ndarray:
    """Return the object keypoint similarity: the mean over the joints asked for, float64 (...); NaN where none was.

    ``similarities``, ``asked_for``: (..., J), of the same joints.
    """
    count = asked_for.sum(-1)
    total = np.where(asked_for, similarities, 0.0).sum(-1)
    return np.divide(total, count, out=np.full(np.shape(count), np.nan), where=count > 0)


def mirror(joints: np.ndarray, width: np.ndarray | int) -> np.ndarray:
    """Mirror joints (..., 133, 3) in a picture ``width`` pixels wide (...): left and right change places.

    Joints that were not found stay (0, 0, 0).
    """
    mirrored = joints[..., MIRRORED_JOINTS, :]  # a copy
    across = np.asarray(width)[..., None] - mirrored[..., 0]
    mirrored[..., 0] = np.where(mirrored[..., 2] > 0, across, 0)
    return mirrored


def _distance(found: np.ndarray, target: np.ndarray) -> np.ndarray:
    offset = found[..., :2].astype(np.float64) - target[..., :2]
    return np.hypot(offset[..., 0], offset[..., 1])


def score_joints(
    joints: Sequence[np.ndarray | None], targets: Sequence[np.ndarray], boxes: Sequence[Box], width: int, height: int
) -> list[dict[str, Any]]:
    """Return the pose columns of each picture: what was found and asked for, the box, and how much of it was met.

    Columns joints, target_joints, box_side, box_area, pose_hits and pose_joints (of the body).

    ``joints`` are those found in it, float (133, 3) in pixels, None where nobody was found: then all that were asked
    for are missed. ``targets`` are those asked for, in the same pixels.
    """
    rows = [
        {
            "joints": None if found is None else found.astype(np.float32).ravel().tolist(),
            "target_joints": target.astype(np.float32).ravel().tolist(),
            "box_side": float(np.float32(box.longer_side)),  # as it is stored, so that it gives the same hits again
            "box_area": float(np.float32(box.area)),
        }
        for found, target, box in zip(joints, targets, boxes)
    ]
    read = Joints.read([row | {"key": "", "width": width, "height": height} for row in rows])
    hits, asked = (each[:, PARTS[HEADLINE]].sum(1).tolist() for each in (read.hit, read.asked))
    return [row | {"pose_hits": hit, "pose_joints": count} for row, hit, count in zip(rows, hits, asked)]
