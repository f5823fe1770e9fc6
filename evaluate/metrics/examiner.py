"""The examiner, which scores every picture once for all tests: the rows of samples.parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluate.metrics.clip import ClipProbe
from evaluate.metrics.colours import score_colours
from evaluate.metrics.joints import CONFIDENCE, JOINTS_BOX, TRUE_BOX, Box, mirror, score_joints
from evaluate.metrics.likeness import Judge, cosine, pixel_features
from evaluate.metrics.pixels import Lpips, lpips_unavailable, score_pixels
from evaluate.records import MODEL, REAL, SAMPLES_SCHEMA
from evaluate.subject import Batch, Row, group_of
from nanodit.config import Config
from nanodit.console import say
from nanodit.errors import ResourceError
from nanodit.keypoints import JOINTS
from prep.dataset.reader import Dataset

if TYPE_CHECKING:  # onnxruntime, which no config and no report needs, takes a while to import
    from prep.encoders.dwpose import DWPose, Pose

UNPUBLISHED = "not the published weights"
Posed = tuple[str, np.ndarray]  # key of the sample whose pose it is, joints (133, 3) in [-1, 1], perhaps mirrored


class Examiner:
    """The scores of pictures against their samples, as far as this dataset and machine allow.

    ``lpips``, ``detector``, ``judge`` and ``probe`` may be None: their columns stay null, and the caller says why.
    ``figures`` tells whether the dataset knows its true attributes, ``box`` where the boxes come from that PCK is
    relative to.
    """

    def __init__(
        self,
        dataset: Dataset,
        lpips: Lpips | None,
        detector: DWPose | None,
        judge: Judge | None = None,
        probe: ClipProbe | None = None,
    ):
        self._dataset, self._lpips, self._detector, self._judge = dataset, lpips, detector, judge
        self._probe = probe
        self.no_lpips: str | None = None if lpips else lpips_unavailable()
        self._real: dict[str, np.ndarray] = {}  # the judge's feature of each real image seen
        self._truth = dataset.truth()
        self.figures = self._truth is not None
        self.box = TRUE_BOX if self.figures else JOINTS_BOX

    @property
    def devices(self) -> dict[str, str]:
        """Where joints, LPIPS and features are computed, as far as they are."""
        encoder = self._judge and self._judge.encoder
        judges = {"joints": self._detector, "lpips": self._lpips, "features": encoder}
        return {name: str(judge.device) for name, judge in judges.items() if judge is not None}

    @property
    def contents(self) -> dict[str, Any]:
        """What the scores depend on besides names: the content of each judge's files, as far as there is one."""
        found = {
            "features": self._judge and self._judge.fingerprint, "probe": self._probe and self._probe.content,
            "joints": self._detector and self._detector.fingerprint(),
            "lpips": self._lpips and self._lpips.backbone_sha256,
        }  # fmt: skip
        return {name: content for name, content in found.items() if content is not None}

    @property
    def lpips_label(self) -> str | None:
        """What LPIPS is measured with; None without it."""
        if self._lpips is None:
            return None
        return "AlexNet v0.1" + ("" if self._lpips.published else f", {UNPUBLISHED}: no meaning")

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
        posed: Sequence[Posed] | None = None,
    ) -> list[dict[str, Any]]:
        """Score pictures uint8 (B, H, W, 3) drawn for the samples of ``batch``.

        ``degenerate`` names what cannot be scored. ``joints`` are detected in the pictures unless given; an empty list
        leaves them out. ``posed`` says of each which pose it was given, where that is not the sample's own.
        """
        degenerate = degenerate or [None] * len(pictures)
        scored = [index for index, reason in enumerate(degenerate) if reason is None]
        columns: list[dict[str, Any]] = [{} for _ in pictures]
        if scored:
            samples = [batch.rows[index] for index in scored]
            poses: list[Pose] = []
            if joints is None:
                # of real photographs the targets are what this detector found before: it has to find that again
                again = kind == REAL and not self.figures
                poses = self.detect(pictures[scored][:, :, ::-1] if again else pictures[scored])
                joints = [pose.keypoints if pose.persons else None for pose in poses]
                if again:
                    joints = [None if one is None else mirror(one, batch.width) for one in joints]
            elif joints:
                joints = [joints[index] for index in scored]
            given = [posed[index] for index in scored] if posed else None
            parts = self._score(batch, samples, pictures[scored], batch.pixels[scored], kind, joints, given)
            for index, part in zip(scored, parts):
                columns[index] = part
            for index, found in zip(scored, poses):
                columns[index]["persons"] = found.persons
        return [
            {
                **dict.fromkeys(SAMPLES_SCHEMA.names),
                "key": row["key"],
                "cluster": group_of(row),
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

    def remember(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the judge's features of real images from their rows."""
        self._real |= {row["key"]: row["feature"] for row in rows if row["kind"] == REAL and row["feature"] is not None}

    def detect(self, pictures: np.ndarray) -> list[Pose]:
        """Find the people in each picture and the joints of the largest; an empty list without a detector."""
        return [] if self._detector is None else self._detector.detect(pictures)

    def stored_joints(self, rows: Sequence[Row], width: int, height: int) -> list[np.ndarray | None]:
        """Return the joints that prep found in these samples, in pixels; an empty list for a dataset without poses."""
        if "pose" not in self._dataset.info["layers"]:
            return []
        from prep.encoders.dwpose import denormalise

        return [denormalise(self._dataset.pose(row), width, height) if row["persons"] else None for row in rows]

    def _score(
        self,
        batch: Batch,
        samples: Sequence[Row],
        pictures: np.ndarray,
        truths: np.ndarray,
        kind: str,
        joints: Sequence[np.ndarray | None],
        posed: Sequence[Posed] | None,
    ) -> list[dict[str, Any]]:
        parts = [score_pixels(pictures, truths, self._lpips) if kind != REAL else [{}] * len(pictures)]
        parts.append(self._features(samples, pictures, truths, kind))
        if joints:
            targets, boxes = self._targets(samples, batch, kind, posed)
            if targets:
                parts.append(score_joints(joints, targets, boxes, batch.width, batch.height))
            if self.figures:
                parts.append(score_colours(pictures, joints, [self._truth[row["key"]] for row in samples]))
            parts.append([{"figure_found": found is not None} for found in joints])
        return [{name: value for part in row for name, value in part.items()} for row in zip(*parts)]

    def _features(
        self, samples: Sequence[Row], pictures: np.ndarray, truths: np.ndarray, kind: str
    ) -> list[dict[str, Any]]:
        """Return both features of each picture, and how like the real image the judge finds it."""
        columns: list[dict[str, Any]] = [{"feature_pixels": pixels} for pixels in pixel_features(pictures)]
        if self._probe is not None and kind == MODEL:
            columns = [
                column | {"feature_probe": seen} for column, seen in zip(columns, self._probe.features(pictures))
            ]
        if self._judge is None:
            return columns
        features = self._judge.features(pictures)
        if kind == REAL:
            self._real |= dict(zip((row["key"] for row in samples), features))
            return [column | {"feature": feature} for column, feature in zip(columns, features)]
        unseen = [index for index, row in enumerate(samples) if row["key"] not in self._real]
        if unseen:
            self._real |= dict(zip((samples[index]["key"] for index in unseen), self._judge.features(truths[unseen])))
        likeness = cosine(features, np.stack([self._real[row["key"]] for row in samples]))
        judged = [{"feature": feature, "dino_similarity": float(like)} for feature, like in zip(features, likeness)]
        return [column | row for column, row in zip(columns, judged)]

    def _targets(
        self, samples: Sequence[Row], batch: Batch, kind: str, posed: Sequence[Posed] | None
    ) -> tuple[list[np.ndarray], list[Box]]:
        """Return the joints to be met and the person's box, in pixels.

        A drawn picture has to meet the pose that it was given; the real one, which shows how good the detector is, the
        true joints (or, without a truth, what prep found).
        """
        if posed:
            from prep.encoders.dwpose import denormalise

            given = [denormalise(joints, batch.width, batch.height) for _, joints in posed]
            return given, [self._box(key, joints) for (key, _), joints in zip(posed, given)]
        stored = self.stored_joints(samples, batch.width, batch.height)
        if self.figures and kind == REAL:
            targets = [np.reshape(self._truth[row["key"]]["keypoints"], (-1, 3)) for row in samples]
        elif stored:
            nobody = np.zeros((JOINTS, 3), np.float32)
            targets = [nobody if found is None else found for found in stored]
        else:
            return [], []
        return targets, [self._box(row["key"], joints) for row, joints in zip(samples, targets)]

    def _box(self, key: str, joints: np.ndarray) -> Box:
        """Return a figure's true box, otherwise the one around the confident ones of a person's joints."""
        if self.figures:
            return Box.around(np.reshape(self._truth[key]["box"], (2, 2)))
        return Box.around(joints[joints[:, 2] >= CONFIDENCE, :2])


class PoseModelsConfig(Config):
    """The two ONNX files of DWPose that judge pictures."""

    detector: str
    pose: str

    @property
    def files(self) -> tuple[Path, Path]:
        """Paths of the person detector and the joint network."""
        return Path(self.detector), Path(self.pose)


def open_detector(
    models: PoseModelsConfig | None, dataset: Dataset, device: str = "cpu"
) -> tuple[DWPose | None, str | None]:
    """Open the detector that judges joints; returns None and the reason where there is none.

    It computes on ``device``, or on the CPU, which a line says, where onnxruntime cannot use that.
    """
    if models is not None:
        files = models.files
    elif dataset.info["encoders"] == "demo":
        from prep.encoders.demo import build_demo_encoders, demo_folder  # imports transformers, which takes seconds

        demo = build_demo_encoders(demo_folder())
        files = demo.detector, demo.pose
    else:
        return None, "no detector: name DWPose's files in pose_models"
    import torch

    from prep.encoders.dwpose import DWPose

    if device != "cpu":
        try:
            return DWPose(*files, device=device), None
        except ResourceError as error:
            say(f"warning: joints are found on the CPU, which takes long on large pictures: {error}")
    return DWPose(*files, threads=torch.get_num_threads()), None


def detector_label(models: PoseModelsConfig | None) -> str:
    """Return what metrics call the detector of :func:`open_detector`."""
    return "demo networks, not a quality claim" if models is None else ", ".join(file.name for file in models.files)
