"""Turns pictures into rows of samples.parquet: every test looks at the same pictures, found joints included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluate.config import EvaluateConfig
from evaluate.metrics import Lpips
from evaluate.records import REAL, SAMPLES_SCHEMA
from evaluate.subject import Batch, Row
from evaluate.suite import attributes, pose, reconstruction
from prep.dwpose import DWPose, denormalise
from prep.shards import Dataset


class Examiner:
    """Scores pictures against their samples with whatever this dataset and machine allow.

    ``lpips`` and ``detector`` may be None: their columns stay null, and the caller says why. ``figures`` tells whether
    the dataset knows its true attributes, ``box`` where the boxes come from that PCK is relative to.
    """

    def __init__(self, dataset: Dataset, lpips: Lpips | None, detector: DWPose | None):
        self._dataset, self._lpips, self._detector = dataset, lpips, detector
        self._truth = dataset.truth()
        self.figures = self._truth is not None
        self.box = pose.TRUE_BOX if self.figures else pose.JOINTS_BOX

    def rows(
        self,
        batch: Batch,
        pictures: np.ndarray,
        *,
        kind: str,
        condition: str,
        seed: int | None = None,
        guidance: float | None = None,
        degenerate: Sequence[str | None] | None = None,
        joints: Sequence[np.ndarray | None] | None = None,
    ) -> list[dict[str, Any]]:
        """Score pictures uint8 (B, H, W, 3) drawn for the samples of ``batch``.

        ``degenerate`` names what cannot be scored. ``joints`` are detected in the pictures unless given; an empty list
        leaves them out.
        """
        degenerate = degenerate or [None] * len(pictures)
        scored = [index for index, reason in enumerate(degenerate) if reason is None]
        columns: list[dict[str, Any]] = [{} for _ in pictures]
        if scored:
            samples = [batch.rows[index] for index in scored]
            if joints is None:
                joints = self.detect(pictures[scored])
            elif joints:
                joints = [joints[index] for index in scored]
            parts = self._score(batch, samples, pictures[scored], batch.pixels[scored], kind, joints)
            for index, part in zip(scored, parts):
                columns[index] = part
        return [
            {
                **dict.fromkeys(SAMPLES_SCHEMA.names),
                "key": row["key"],
                "seed": seed,
                "kind": kind,
                "condition": condition,
                "guidance": guidance,
                "bucket": batch.bucket,
                "width": batch.width,
                "height": batch.height,
                "caption": row.get("caption"),
                "degenerate": reason,
                **scores,
            }
            for row, reason, scores in zip(batch.rows, degenerate, columns)
        ]

    def detect(self, pictures: np.ndarray) -> list[np.ndarray | None]:
        """Joints (133, 3) found in each picture, None where there is no person; an empty list without a detector."""
        if self._detector is None:
            return []
        return [found.keypoints if found.persons else None for found in self._detector.detect(pictures)]

    def stored_joints(self, rows: Sequence[Row], width: int, height: int) -> list[np.ndarray | None]:
        """The joints that prep found in these samples, in pixels; an empty list for a dataset without poses."""
        if "pose" not in self._dataset.info["layers"]:
            return []
        return [denormalise(self._dataset.pose(row), width, height) if row["persons"] else None for row in rows]

    def _score(
        self,
        batch: Batch,
        samples: Sequence[Row],
        pictures: np.ndarray,
        truths: np.ndarray,
        kind: str,
        joints: Sequence[np.ndarray | None],
    ) -> list[dict[str, Any]]:
        parts = [reconstruction.score(pictures, truths, self._lpips) if kind != REAL else [{}] * len(pictures)]
        if joints:
            targets, sides = self._targets(samples, batch, kind)
            if targets:
                parts.append(pose.score(joints, targets, sides))
            if self.figures:
                parts.append(attributes.score(pictures, joints, [self._truth[row["key"]] for row in samples]))
            parts.append([{"figure_found": found is not None} for found in joints])
        return [{name: value for part in row for name, value in part.items()} for row in zip(*parts)]

    def _targets(self, samples: Sequence[Row], batch: Batch, kind: str) -> tuple[list[np.ndarray], list[float]]:
        """The joints to be met and the longer side of the person's box, in pixels.

        A drawn picture has to meet the pose that it was given; the real one, which shows how good the detector is, the
        true joints (or, without a truth, what prep found).
        """
        stored = self.stored_joints(samples, batch.width, batch.height)
        if self.figures:
            truths = [self._truth[row["key"]] for row in samples]
            sides = [longer_side(np.reshape(truth["box"], (2, 2))) for truth in truths]
            if kind == REAL:
                return [np.reshape(truth["keypoints"], (-1, 3)) for truth in truths], sides
        if not stored:
            return [], []
        nobody = np.zeros((133, 3), np.float32)
        stored = [nobody if found is None else found for found in stored]
        return stored, sides if self.figures else [longer_side(_confident(found)) for found in stored]


def longer_side(corners: np.ndarray) -> float:
    """The longer side of the box around points (n, 2), in their unit; 0 without points."""
    return float(np.ptp(corners, axis=0).max()) if len(corners) else 0.0


def _confident(joints: np.ndarray) -> np.ndarray:
    return joints[joints[:, 2] >= pose.CONFIDENCE, :2]


def open_detector(config: EvaluateConfig, dataset: Dataset) -> tuple[DWPose | None, str | None]:
    """The detector that judges joints, or None and the reason why there is none."""
    if config.pose_models is not None:
        return DWPose(*config.pose_models.files), None
    if dataset.info["encoders"] == "demo":
        from prep.demo import build_demo_encoders, demo_folder  # imports transformers, which takes seconds

        demo = build_demo_encoders(demo_folder())
        return DWPose(demo.detector, demo.pose), None
    return None, "no detector: name DWPose's files in pose_models"
