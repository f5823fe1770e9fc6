"""Is every named colour where the caption says? Judged on pixels at the joints found in the very picture judged.

For the built-in figures, whose captions name the colours of top, trousers, hair and background. The judge looks at the
inside of each garment, takes the median colour and names the nearest palette colour under any of the lights that
figures are drawn in. A picture in which no figure is found is wrong in everything. The judge never sees the truth, and
its score on the real holdout is printed beside every score it gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluate.drawing.context import DrawingContext, Rows
from evaluate.drawing.pictures import Picture
from evaluate.metrics.colours import CHANCE
from evaluate.records import ATTRIBUTES, BASELINE, MODEL, REAL, Metric, Skipped, degenerate_reason, select
from evaluate.statistics import intervals as statistics


def pictures(context: DrawingContext, config: None = None) -> tuple[list[Picture], list[Skipped]]:
    """Every sample under each of the configured conditions."""
    return context.configured()


def summarise(rows: Rows, context: DrawingContext, config: None = None) -> tuple[list[Metric], list[Skipped]]:
    """``attribute_accuracy/CONDITION`` of every configured condition with text, see :func:`accuracies`."""
    if context.no_detector:
        return [], [Skipped("attribute_accuracy", context.no_detector)]
    if not context.figures:
        return [], [Skipped("attribute_accuracy", "the dataset has no truth.parquet; only built-in figures have one")]
    arms = [arm for arm in context.arms if "text" in arm.subset]
    return accuracies(rows.all, [arm.name for arm in arms], context.settings_of(arms)), []


def accuracies(
    samples: Sequence[Mapping[str, Any]], conditions: Sequence[str], settings: Mapping[str, Mapping[str, Any]]
) -> list[Metric]:
    """``attribute_accuracy/CONDITION``, the mean over the four attributes, and one metric for each attribute.

    ``settings`` maps a condition to what its pictures were drawn with. Intervals resample images: the four judgements
    and all seeds of an image stay together.
    """
    metrics = []
    for condition in conditions:
        rows = select(samples, MODEL, condition)
        for name in (None, *ATTRIBUTES):
            judged = ATTRIBUTES if name is None else (name,)
            metric = f"attribute_accuracy/{condition}" + (f"/{name}" if name else "")
            baselines = {"chance": float(np.mean([CHANCE[attribute] for attribute in judged]))}
            for label, kind, arm in (("random_pair", BASELINE, "random_pair"), ("judge_on_real", REAL, "real")):
                other = select(samples, kind, arm)
                if other:
                    baselines[label] = float(np.mean([_right(row, judged) for row in other])) / len(judged)
            details = {"baselines": baselines, "settings": settings[condition]}
            reason = degenerate_reason(rows)
            if reason:
                metrics.append(Metric(metric, None, n=len({row["key"] for row in rows}), reason=reason, **details))
                continue
            right = [_right(row, judged) for row in rows]
            interval = statistics.proportion(right, [len(judged)] * len(rows), [row["key"] for row in rows])
            metrics.append(Metric.of(metric, interval, **details))
    return metrics


def _right(row: Mapping[str, Any], attributes: Sequence[str]) -> int:
    """How many of these attributes were judged to be what the caption says."""
    return sum(row[f"{name}_judged"] == row[f"{name}_true"] for name in attributes)
