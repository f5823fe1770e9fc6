"""How near a picture drawn from a sample's own conditions comes to that sample, pixel by pixel and perceptually."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluate import metrics, statistics
from evaluate.records import BASELINE, MODEL, Metric, Skipped, degenerate_reason, select

if TYPE_CHECKING:
    from evaluate.context import Context, Rows
    from evaluate.pictures import Picture

BASELINES = ("random_pair", "mean_image", "round_trip")
PSNR_CEILING = 10 * np.log10(12 * 255**2)  # 58.9 dB: the error that rounding to 8 bits leaves of a perfect picture
MEASURES = {"psnr": ("higher", "dB"), "ssim": ("higher", ""), "lpips": ("lower", "")}


def score(pictures: np.ndarray, truths: np.ndarray, lpips: metrics.Lpips | None) -> list[dict[str, float | None]]:
    """Columns mse, psnr, ssim and lpips for each picture, uint8 (B, H, W, 3), against its truth.

    PSNR is at most PSNR_CEILING, so that an exact copy has a number; LPIPS is null without its weights.
    """
    columns = {
        "mse": metrics.mse(pictures, truths),
        "psnr": np.minimum(metrics.psnr(pictures, truths), PSNR_CEILING),
        "ssim": metrics.ssim(pictures, truths),
        "lpips": np.full(len(pictures), np.nan) if lpips is None else lpips(pictures, truths),
    }
    finite = {name: [float(v) if np.isfinite(v) else None for v in values] for name, values in columns.items()}
    return [dict(zip(finite, values)) for values in zip(*finite.values())]


def pictures(context: Context) -> tuple[list[Picture], list[Skipped]]:
    """Every sample under each of the configured conditions."""
    return context.configured()


def summarise(rows: Rows, context: Context) -> tuple[list[Metric], list[Skipped]]:
    """``reconstruction/MEASURE/CONDITION`` of every configured condition, see :func:`likeness`."""
    measures, skipped = list(MEASURES), []
    if context.examiner.no_lpips:
        measures.remove("lpips")
        skipped.append(Skipped("reconstruction/lpips", context.examiner.no_lpips))
    arms = context.arms
    return likeness(rows.all, [arm.name for arm in arms], context.settings_of(arms), measures), skipped


def likeness(
    samples: Sequence[Mapping[str, Any]],
    conditions: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
    measures: Sequence[str],
) -> list[Metric]:
    """``reconstruction/MEASURE`` given everything and ``reconstruction/MEASURE/CONDITION``, with the baselines.

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
        found.append(_gain(f"reconstruction/psnr_gain{suffix}", rows, others["random_pair"], settings[condition]))
    return found


def _metric(name: str, rows: Sequence[Mapping[str, Any]], measure: str, details: Mapping[str, Any]) -> Metric:
    if reason := degenerate_reason(rows):
        return Metric(name, None, n=len({row["key"] for row in rows}), reason=reason, **details)
    return Metric.of(name, statistics.mean([row[measure] for row in rows], [row["key"] for row in rows]), **details)


def _gain(
    name: str, rows: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Metric:
    details = {"settings": settings, "unit": "dB", "baselines": {"random_pair": 0.0}}
    random = {row["key"]: row["psnr"] for row in pairs}
    paired = [row for row in rows if random.get(row["key"]) is not None]
    reason = degenerate_reason(rows)
    if not reason and not paired:
        reason = "no sample has another of its bucket to be paired with"
    if reason:
        return Metric(name, None, n=len({row["key"] for row in rows}), reason=reason, **details)
    keys = [row["key"] for row in paired]
    interval = statistics.paired_difference([row["psnr"] for row in paired], [random[key] for key in keys], keys)
    return Metric.of(name, interval, **details)


def _mean(rows: Sequence[Mapping[str, Any]], measure: str) -> float | None:
    values = [row[measure] for row in rows if row[measure] is not None]
    return float(np.mean(values)) if values else None
