"""The likeness of a picture drawn from a sample's own conditions to that sample, by pixels and perceptually.

Given everything, one condition alone, and nothing, all without guidance and from the same noise, so that they may be
compared; and under the configured conditions with their guidance. The baselines need no model: another image of the
bucket, the mean image, the nearest training image, a JPEG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from evaluate.drawing.arms import DrawingArm
from evaluate.drawing.context import DrawingContext, Rows
from evaluate.drawing.pictures import Picture
from evaluate.metrics.examiner import UNPUBLISHED
from evaluate.records import (
    BASELINE,
    MEASURES,
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
from evaluate.suite.declaration import SuiteTest, Values
from nanodit.config import Config

BASELINES = (*NO_SKILL, "round_trip")
SKILLS = {"psnr": "mse"}  # what a measure's skill is computed on, where that is not the measure: dB have no floor
QUANTILES = {"worst": 0.0, "median": 0.5, "best": 1.0}  # pictures kept for the report, by their rank
# What the original recipe calls LPIPS values below these: a reference for readers, never a verdict.
LPIPS_SCALE = {"excellent": 0.3, "good": 0.5, "blurry": 0.7}
SCALE_WORDS = (
    "reference scale of the original recipe, a rule of thumb: <0.3 excellent, 0.3-0.5 good, 0.5-0.7 blurry, >0.7 poor"
)


class ReconstructionConfig(Config):
    """The conditions given, each drawn without guidance."""

    conditions: list[str] = Field(default=["all", "text", "dino", "pose", "nothing"])


def _arms(context: DrawingContext, config: ReconstructionConfig) -> tuple[list[DrawingArm], list[Skipped]]:
    """Return the configured conditions, then those of this test, and what of either is left out."""
    _, skipped = context.configured()
    arms = {arm.name: arm for arm in context.arms}
    for conditions in config.conditions:
        arm = context.arm(conditions, 1.0, test="reconstruction")
        if isinstance(arm, Skipped):
            skipped.append(arm)
        else:
            arms.setdefault(arm.name, arm)
    return list(arms.values()), skipped


def pictures(context: DrawingContext, config: ReconstructionConfig) -> tuple[list[Picture], list[Skipped]]:
    """Ask for every sample and noise, given each of these conditions."""
    arms, skipped = _arms(context, config)
    return [picture for arm in arms for picture in context.of_all(arm)], skipped


def summarise(rows: Rows, context: DrawingContext, config: ReconstructionConfig) -> tuple[list[Metric], list[Skipped]]:
    """Return every measure of each of these conditions (:func:`likeness`) and its skill (:func:`skills`)."""
    missing = {"lpips": context.examiner.no_lpips, "dino_similarity": context.no_judge}
    skipped = [Skipped(f"reconstruction/{measure}", reason) for measure, reason in missing.items() if reason]
    measures = [measure for measure in MEASURES if not missing.get(measure)]
    arms, _ = _arms(context, config)
    names, settings = [arm.name for arm in arms], context.settings_of(arms, **context.judged)
    found = likeness(rows.all, names, settings, measures) + skills(rows.all, names, settings, measures)
    found = [replace(one, settings={**one.settings, **context.lpips}) if "lpips" in one.name else one for one in found]
    extras = {"lpips_scale": LPIPS_SCALE} if "lpips" in measures else {}
    ranked = quantiles(rows.select(MODEL, names[0], 0)) if names else []
    if ranked:
        given = "all conditions" if names[0] == "all" else names[0]
        rule = f"worst, median and best PSNR of the {len(context.keys)} pictures given {given} with the first noise"
        extras["quantiles"] = {"condition": names[0], "rule": rule, "samples": ranked}
        for one in ranked:
            context.show(REAL, "real", one["key"])
            for arm in context.arms:
                context.show(MODEL, arm.name, one["key"], 0)
    if extras:
        context.extras["reconstruction"] = extras
    return found, skipped


def scale_words(name: str, value: float | None, settings: Mapping[str, Any]) -> str:
    """Return what the original recipe calls an LPIPS value; empty for other metrics and those without a value."""
    if value is None or name.split("/")[:2] != ["reconstruction", "lpips"]:
        return ""
    if UNPUBLISHED in str(settings.get("lpips")):
        return f"not on the {SCALE_WORDS}; these are not the published weights"
    word = next((word for word, below in LPIPS_SCALE.items() if value < below), "poor")
    return f"{word} ({SCALE_WORDS})"


def lpips_to_own(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    others: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Mapping[str, Any],
    reason: str | None = None,
) -> Metric:
    """Return the mean LPIPS of pictures to their samples' own images, beside that of ``others``; None for a reason."""
    keys = {row["key"] for row in rows}
    baselines = {
        label: value for label, own in others.items() if (value := _mean([r for r in own if r["key"] in keys], "lpips"))
        is not None
    }  # fmt: skip
    details = {"baselines": baselines, "settings": settings, "better": "lower"}
    if reason := reason or degenerate_reason(rows):
        return Metric(name, None, n=len(keys), reason=reason, **details)
    return Metric.of(name, intervals.mean([row["lpips"] for row in rows], [cluster_of(row) for row in rows]), **details)


def quantiles(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the pictures at QUANTILES of PSNR, ties in the order of their keys; empty where any cannot be scored."""
    if not rows or any(row["psnr"] is None for row in rows):
        return []
    ranked = sorted(rows, key=lambda row: (row["psnr"], row["key"]))
    places = {label: round(quantile * (len(ranked) - 1)) for label, quantile in QUANTILES.items()}
    return [
        {"label": label, "quantile": QUANTILES[label], "key": ranked[place]["key"], "value": ranked[place]["psnr"]}
        for label, place in places.items()
    ]


def likeness(
    samples: Sequence[Mapping[str, Any]],
    conditions: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
    measures: Sequence[str],
) -> list[Metric]:
    """Return ``reconstruction/MEASURE`` given everything and ``reconstruction/MEASURE/CONDITION``, with the baselines.

    ``reconstruction/psnr_gain`` is the paired difference in PSNR to a random pair: how many dB nearer the picture is
    than another image of the same bucket. ``settings`` maps a condition to what its pictures were drawn with.
    """
    found = []
    others = {name: select(samples, BASELINE, name) for name in BASELINES}
    for condition in conditions:
        suffix = "" if condition == "all" else f"/{condition}"
        rows = select(samples, MODEL, condition)
        for measure in measures:
            better, unit = MEASURES[measure]
            baselines = {name: mean for name, arm in others.items() if (mean := _mean(arm, measure)) is not None}
            details = {"baselines": baselines, "settings": settings[condition], "better": better, "unit": unit}
            found.append(_metric(f"reconstruction/{measure}{suffix}", rows, measure, details))
        found.append(_gain(f"reconstruction/psnr_gain{suffix}", rows, others, settings[condition]))
    return found


def _metric(name: str, rows: Sequence[Mapping[str, Any]], measure: str, details: Mapping[str, Any]) -> Metric:
    if reason := degenerate_reason(rows):
        return Metric(name, None, n=len({row["key"] for row in rows}), reason=reason, **details)
    return Metric.of(name, intervals.mean([row[measure] for row in rows], [cluster_of(row) for row in rows]), **details)


def _gain(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    others: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Mapping[str, Any],
) -> Metric:
    random = {row["key"]: row["psnr"] for row in others["random_pair"]}
    baselines = {"random_pair": 0.0}
    for label in NO_SKILL[1:]:
        gains = [row["psnr"] - random[row["key"]] for row in others[label] if random.get(row["key"]) is not None]
        baselines |= {label: float(np.mean(gains))} if gains else {}
    details = {"settings": settings, "unit": "dB", "baselines": baselines}
    paired = [row for row in rows if random.get(row["key"]) is not None]
    reason = degenerate_reason(rows)
    if not reason and not paired:
        reason = "no sample has another of its bucket to be paired with"
    if reason:
        return Metric(name, None, n=len({row["key"] for row in rows}), reason=reason, **details)
    keys = [row["key"] for row in paired]
    clusters = [cluster_of(row) for row in paired]
    interval = intervals.paired_difference([row["psnr"] for row in paired], [random[key] for key in keys], clusters)
    return Metric.of(name, interval, **details)


def skills(
    samples: Sequence[Mapping[str, Any]],
    conditions: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
    measures: Sequence[str],
) -> list[Metric]:
    """Return ``reconstruction/skill_MEASURE``: the share of the way from a random pair to a JPEG of the truth itself.

    ``(random - model) / (random - floor)`` of the means, on the squared error for PSNR: 0 is no better than any other
    image of the bucket, 1 is a copy. Conditions as in :func:`likeness`.
    """
    others = {name: {row["key"]: row for row in select(samples, BASELINE, name)} for name in BASELINES}
    found = []
    for condition in conditions:
        suffix = "" if condition == "all" else f"/{condition}"
        rows = select(samples, MODEL, condition)
        for measure in measures:
            column = SKILLS.get(measure, measure)
            name = f"reconstruction/skill_{column}{suffix}"
            found.append(_skill(name, rows, column, others, settings[condition]))
    return found


def _skill(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    column: str,
    others: Mapping[str, Mapping[str, Mapping[str, Any]]],
    settings: Mapping[str, Any],
) -> Metric:
    random, floor = others["random_pair"], others["round_trip"]
    paired = [row for row in rows if row["key"] in random and row["key"] in floor]
    details: dict[str, Any] = {"settings": settings, "baselines": {"random_pair": 0.0, "round_trip": 1.0}}
    reason = degenerate_reason(rows)
    if not reason and not paired:
        reason = "no sample has another of its bucket to be paired with"
    if reason:
        return Metric(name, None, n=len({row["key"] for row in rows}), reason=reason, **details)
    keys = [row["key"] for row in paired]
    ways = {key: random[key][column] - floor[key][column] for key in dict.fromkeys(keys)}  # sums in one order
    for label in NO_SKILL[1:]:
        if all(key in others[label] for key in keys):
            gained = sum(random[key][column] - others[label][key][column] for key in ways)
            details["baselines"][label] = gained / sum(ways.values())
    gains = [random[row["key"]][column] - row[column] for row in paired]
    clusters = [cluster_of(row) for row in paired]
    return Metric.of(name, intervals.quotient(gains, [ways[key] for key in keys], clusters), **details)


def _mean(rows: Sequence[Mapping[str, Any]], measure: str) -> float | None:
    values = [row[measure] for row in rows if row[measure] is not None]
    return float(np.mean(values)) if values else None


def values_of(name: str, evidence: Any) -> Values | None:
    """Return the pictures that a metric is a mean over; None for other metrics."""
    _, _, rest = name.partition("/")
    measure, _, condition = rest.partition("/")
    if measure not in MEASURES:
        return None
    return {(row["key"], row["seed"]): (row[measure], 1) for row in select(evidence.samples, MODEL, condition or "all")}


TEST = SuiteTest(
    name="reconstruction",
    title="Reconstruction",
    pictures=pictures,
    summarise=summarise,
    config=ReconstructionConfig,
    families={
        "reconstruction/psnr": "PSNR",
        "reconstruction/psnr_gain": "PSNR gained over a random pair",
        "reconstruction/ssim": "SSIM",
        "reconstruction/lpips": "LPIPS",
        "reconstruction/dino_similarity": "DINO similarity",
        "reconstruction/skill_mse": "Skill on squared error",
        "reconstruction/skill_ssim": "Skill on SSIM",
        "reconstruction/skill_lpips": "Skill on LPIPS",
        "reconstruction/skill_dino_similarity": "Skill on DINO similarity",
    },
    minimised={
        "reconstruction/psnr": "flow",
        "reconstruction/skill_mse": "flow",
        "reconstruction/lpips": "lpips",
        "reconstruction/skill_lpips": "lpips",
        "reconstruction/dino_similarity": "judge",
        "reconstruction/skill_dino_similarity": "judge",
    },
    values=values_of,
    beside=scale_words,
    terms=(
        (
            "Reconstruction",
            "A picture drawn from a sample's own conditions against that sample. PSNR on 8-bit pixels; SSIM with an "
            "11 × 11 Gaussian window (Wang et al. 2004); LPIPS v0.1 with AlexNet (Zhang et al. 2018); DINO "
            "similarity: cosine of the class tokens of an encoder that was neither condition nor teacher. Random "
            "pair: another holdout image of the same shape. Mean image: of the training set. JPEG round trip: quality "
            "95, 4:4:4. Skill: (random pair − model) / (random pair − round trip), on the squared error for PSNR: 0 "
            "is any other image, 1 a copy.",
        ),
    ),
)
