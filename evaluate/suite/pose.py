"""Are the joints where they were asked for? PCK of the 17 body joints, re-detected in the picture drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluate import statistics
from evaluate.metrics import BODY_JOINTS, keypoint_hits
from evaluate.records import BASELINE, MODEL, REAL, Metric, Skipped, degenerate_reason, select

if TYPE_CHECKING:
    from evaluate.context import Context, Rows
    from evaluate.pictures import Picture

ALPHA = 0.1  # of the longer side of the person's box
CONFIDENCE = 0.3
# where the person's box comes from: what the allowance is a part of, so PCKs under the two are not comparable
TRUE_BOX, JOINTS_BOX = "true box", "box around the confident joints that prep found"


def score(
    joints: Sequence[np.ndarray | None], targets: Sequence[np.ndarray], longer_sides: Sequence[float]
) -> list[dict[str, Any]]:
    """Columns joints, target_joints, box_side, pose_hits and pose_joints for each picture.

    ``joints`` are those found in it, float (17 or more, 3) in pixels, None where no figure was found: then all that
    were asked for are missed. ``targets`` are those asked for, in the same pixels.
    """
    rows = []
    for found, target, side in zip(joints, targets, longer_sides):
        target = target[:BODY_JOINTS]
        detected = np.zeros_like(target) if found is None else found[:BODY_JOINTS]
        hits, asked = keypoint_hits(detected, target, side, ALPHA, CONFIDENCE)
        rows.append(
            {
                "joints": None if found is None else detected.astype(np.float32).ravel().tolist(),
                "target_joints": target.astype(np.float32).ravel().tolist(),
                "box_side": float(side),
                "pose_hits": hits,
                "pose_joints": asked,
            }
        )
    return rows


def pictures(context: Context) -> tuple[list[Picture], list[Skipped]]:
    """Every sample under each of the configured conditions."""
    return context.configured()


def summarise(rows: Rows, context: Context) -> tuple[list[Metric], list[Skipped]]:
    """``pose_pck/CONDITION`` of every configured condition with a pose, see :func:`pck`."""
    if context.examiner.blind:
        return [], [Skipped("pose_pck", context.examiner.blind)]
    arms = [arm for arm in context.arms if "pose" in arm.subset]
    return pck(rows.all, [arm.name for arm in arms], context.settings_of(arms), context.examiner.box), []


def pck(
    samples: Sequence[Mapping[str, Any]], conditions: Sequence[str], settings: Mapping[str, Mapping[str, Any]], box: str
) -> list[Metric]:
    """``pose_pck/CONDITION``: joints found where they were asked for, over joints asked for, pooled over images.

    Baselines: another sample's joints in their place (floor), and the detector on the real image against the truth,
    where there is one (ceiling). Samples in which no joint was asked for do not count. ``box`` is TRUE_BOX or
    JOINTS_BOX, for the settings.
    """
    metrics = []
    for condition in conditions:
        drawn = select(samples, MODEL, condition)
        name = f"pose_pck/{condition}"
        baselines = {}
        for label, kind, arm in (("random_pair", BASELINE, "random_pair"), ("detector_on_real", REAL, "real")):
            other = [row for row in select(samples, kind, arm) if row["pose_joints"]]
            if other:
                baselines[label] = sum(row["pose_hits"] for row in other) / sum(row["pose_joints"] for row in other)
        own = {**settings[condition], "alpha": ALPHA, "of": f"longer side of the {box}", "confidence": CONFIDENCE}
        details = {"baselines": baselines, "settings": own}
        rows = [row for row in drawn if row["pose_joints"]]
        reason = degenerate_reason(drawn) or (None if rows else "no sample has a pose to ask for")
        if reason:
            metrics.append(Metric(name, None, n=len({row["key"] for row in drawn}), reason=reason, **details))
            continue
        hits, asked = [row["pose_hits"] for row in rows], [row["pose_joints"] for row in rows]
        metrics.append(Metric.of(name, statistics.proportion(hits, asked, [row["key"] for row in rows]), **details))
    return metrics
