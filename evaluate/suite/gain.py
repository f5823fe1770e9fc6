"""What a condition adds: the pictures of the arm that isolates it, less those of the arm without it, in pairs.

DINO features say nearly everything that a text and a pose say, so pictures drawn from all conditions show the right
colours and joints whether or not text and pose are looked at. The arm that isolates a condition has no DINO features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from evaluate.drawing.arms import DrawingArm
from evaluate.drawing.context import DrawingContext, Rows
from evaluate.records import MODEL, Metric, Skipped, cluster_of, degenerate_reason
from evaluate.statistics import intervals

GIVEN = ("text+pose", "text", "pose", "nothing")  # what a pair is looked for among, the fullest first
NO_GAIN = "no_gain"  # whoever ignores the condition
CEILING = "ceiling_on_real"

Score = Callable[[Mapping[str, Any]], tuple[int, int]]  # of a row of samples.parquet: how many are right, of how many


def isolating(condition: str, context: DrawingContext, rows: Rows) -> tuple[DrawingArm, DrawingArm] | None:
    """Return the arm that isolates a condition and the arm without it, both drawn for all samples and noises.

    ``text`` is isolated by text + pose against the pose alone, else by the text alone against nothing; the pose
    likewise. What both are given is guided alike, as guidance alone makes a picture clearer; the configured guidance
    comes first. None where no such pair was drawn.
    """
    asked = [context.arm(given, guidance) for given in GIVEN for guidance in (None, 1.0)]
    pictures = len(context.keys) * context.config.seeds
    drawn = {arm.name: arm for arm in asked if not isinstance(arm, Skipped)}
    arms = [arm for arm in drawn.values() if len(rows.select(MODEL, arm.name)) == pictures]
    pairs = (
        (arm, other)
        for arm in arms
        for other in arms
        if condition in arm.subset and other.subset == arm.subset - {condition} and _guided_alike(arm, other)
    )
    return next(pairs, None)


def _guided_alike(arm: DrawingArm, other: DrawingArm) -> bool:
    """Whether ``other`` is ``arm`` for a model that ignores what only ``arm`` is given."""
    guidance = arm.guidance.of_given(other.subset)
    return guidance == other.guidance or (not other.subset and guidance.self_scale == 1)  # nothing has no guidance


def undrawn(name: str, condition: str, found: list[Metric], context: DrawingContext) -> list[Skipped]:
    """Say why there is no gain, where pictures with the condition were drawn and there is none."""
    if found or not any(condition in arm.subset for arm in context.arms):
        return []
    why = f"no arm that isolates the {condition} was drawn beside the same one without it, guided alike"
    return [Skipped(name, f"{why}: such as {condition} (conditions) and nothing (reconstruction.conditions)")]


def gain(
    name: str,
    condition: str,
    context: DrawingContext,
    rows: Rows,
    score: Score,
    marks: Mapping[str, float],
    **settings: Any,
) -> list[Metric]:
    """Return ``NAME/CONDITIONS``: the share that is right with ``condition``, less that without it, of the same noises.

    Baselines: ``no_gain``, and what would be gained at each of the ``marks``: the share that is right by luck in
    pictures of anybody, which is no gain either where without the condition nobody is drawn, and CEILING, the share
    that the judge finds right in real images. Empty where no pair was drawn.
    """
    pair = isolating(condition, context, rows)
    if pair is None:
        return []
    arm, other = pair
    with_it, without = (rows.select(MODEL, one.name) for one in pair)
    against = {"without": other.name, "guidance_without": other.guidance.value}
    details = {"settings": context.settings(arm.name, arm.guidance, **against, **settings)}
    name = f"{name}/{arm.name}"
    below = {(row["key"], row["seed"]): score(row) for row in without}
    counted = [(row, score(row), below[row["key"], row["seed"]]) for row in with_it]
    counted = [(row, one, two) for row, one, two in counted if one[1] and one[1] == two[1]]
    reason = degenerate_reason([*with_it, *without]) or (None if counted else "no picture was asked for any of it")
    if reason:
        return [Metric(name, None, n=len(context.keys), reason=reason, **details)]
    whole = [of for _, (_, of), _ in counted]
    gained = [one[0] - two[0] for _, one, two in counted]
    lacking = sum(two[0] for _, _, two in counted) / sum(whole)
    baselines = {NO_GAIN: 0.0} | {label: share - lacking for label, share in marks.items()}
    interval = intervals.ratio(gained, whole, [cluster_of(row) for row, _, _ in counted])
    return [Metric.of(name, interval, baselines=baselines, **details)]
