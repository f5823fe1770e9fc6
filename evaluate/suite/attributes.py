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
from evaluate.metrics.colours import CHANCE, PALETTES
from evaluate.records import (
    ATTRIBUTES,
    BASELINE,
    MODEL,
    NO_SKILL,
    REAL,
    Metric,
    Skipped,
    cluster_of,
    degenerate_reason,
    select,
)
from evaluate.statistics import intervals
from evaluate.suite.declaration import Section, SuiteTest, Values
from evaluate.suite.gain import CEILING, gain, undrawn


def pictures(context: DrawingContext, config: None = None) -> tuple[list[Picture], list[Skipped]]:
    """Ask for every sample under each of the configured conditions."""
    return context.configured()


def summarise(rows: Rows, context: DrawingContext, config: None = None) -> tuple[list[Metric], list[Skipped]]:
    """Return ``attribute_accuracy/CONDITION`` of every configured condition with text, see :func:`accuracies`.

    And ``attribute_gain/CONDITIONS``: what the text adds, see :func:`evaluate.suite.gain.gain`.
    """
    if context.no_detector:
        return [], [Skipped("attribute_accuracy", context.no_detector)]
    if not context.figures:
        return [], [Skipped("attribute_accuracy", "the dataset has no truth.parquet; only built-in figures have one")]
    arms = [arm for arm in context.arms if "text" in arm.subset]
    real = rows.select(REAL, "real")
    ceiling = float(np.mean([_right(row, ATTRIBUTES) for row in real])) / len(ATTRIBUTES)
    marks = {"chance": float(np.mean([CHANCE[name] for name in ATTRIBUTES])), CEILING: ceiling}
    gained = gain("attribute_gain", "text", context, rows, _score, marks)
    skipped = undrawn("attribute_gain", "text", gained, context)
    return accuracies(rows.all, [arm.name for arm in arms], context.settings_of(arms)) + gained, skipped


def accuracies(
    samples: Sequence[Mapping[str, Any]], conditions: Sequence[str], settings: Mapping[str, Mapping[str, Any]]
) -> list[Metric]:
    """Return ``attribute_accuracy/CONDITION``, the mean over the four attributes, and one metric for each attribute.

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
            arms = [(name, BASELINE, name) for name in NO_SKILL] + [("judge_on_real", REAL, "real")]
            for label, kind, arm in arms:
                other = [row for row in select(samples, kind, arm) if row[f"{name or ATTRIBUTES[0]}_true"]]
                if other:
                    baselines[label] = float(np.mean([_right(row, judged) for row in other])) / len(judged)
            details = {"baselines": baselines, "settings": settings[condition]}
            reason = degenerate_reason(rows)
            if reason:
                metrics.append(Metric(metric, None, n=len({row["key"] for row in rows}), reason=reason, **details))
                continue
            right = [_right(row, judged) for row in rows]
            interval = intervals.proportion(right, [len(judged)] * len(rows), [cluster_of(row) for row in rows])
            metrics.append(Metric.of(metric, interval, **details))
    return metrics


def _right(row: Mapping[str, Any], attributes: Sequence[str]) -> int:
    """Return how many of these attributes were judged to be what the caption says."""
    return sum(row[f"{name}_judged"] == row[f"{name}_true"] for name in attributes)


def _score(row: Mapping[str, Any]) -> tuple[int, int]:
    return _right(row, ATTRIBUTES), len(ATTRIBUTES)


def values_of(name: str, evidence: Any) -> Values | None:
    """Return the pictures that an accuracy is pooled over: how many attributes were right, and of how many."""
    family, _, rest = name.partition("/")
    if family != "attribute_accuracy":
        return None
    condition, _, attribute = rest.partition("/")
    judged = (attribute,) if attribute else ATTRIBUTES
    rows = select(evidence.samples, MODEL, condition or "all")
    return {(row["key"], row["seed"]): (_right(row, judged), len(judged)) for row in rows}


def confusions(page: Any) -> dict[str, Any] | None:
    """Count for each condition and attribute how often a colour of the caption (row) was judged which (column)."""
    named = [metric for metric in page.metrics if metric["name"].startswith("attribute_accuracy/")]
    result = []
    for condition in dict.fromkeys(metric["settings"]["conditions"] for metric in named):
        rows = [row for row in select(page.samples, MODEL, condition) if not row["degenerate"]]
        tables = []
        for name in ATTRIBUTES:
            pairs = [(row[f"{name}_true"], row[f"{name}_judged"]) for row in rows]
            columns = [*PALETTES[name], *([None] if any(judged is None for _, judged in pairs) else [])]
            lines = []
            for true in PALETTES[name]:
                counts = [pairs.count((true, judged)) for judged in columns]
                lines.append({"true": true, "counts": counts, "total": sum(counts)})
            right = sum(true == judged for true, judged in pairs)
            tables.append({"name": name, "columns": columns, "lines": lines, "right": right, "n": len(pairs)})
        result.append({"condition": page.words(condition), "tables": tables})
    return {"blocks": result} if result else None


TEST = SuiteTest(
    name="attributes",
    title="Attributes",
    pictures=pictures,
    summarise=summarise,
    stem="attribute",
    families={"attribute_accuracy": "Attribute accuracy", "attribute_gain": "Attribute accuracy gained by the text"},
    isolated="attribute_gain",
    headline=("text+pose", "text"),
    values=values_of,
    terms=(
        (
            "Attribute accuracy",
            "The share of the colours named in the caption (top, trousers, background, hair) that the picture shows. "
            "Joints are detected in the picture, and the median colour inside each garment counts as the palette "
            "colour that is nearest in CIELAB under any of the lights. A picture without a detected figure counts as "
            "wrong. “Judge on real” is the same judge on the holdout's own images. Gained by the text: the "
            "accuracy of an arm without image features, which alone say the colours, less that of the same arm without "
            "the text, from the same noises.",
        ),
    ),
    section=Section(
        "Which colours come out",
        "Rows are the colours that the captions name, columns the colours that the judge saw (– where no figure was "
        "found). The numbers count pictures.",
        confusions,
        "attributes.html",
    ),
)
