"""The distance of the drawn pictures, as a set, from real ones: FD, KID and CMMD on the judge's features.

The reference are training images, for FD as many as there are pictures, for KID and CMMD all whose features are known.
The floor is what the holdout's real images score against the same reference at the same n: a perfect model is at the
floor, not at zero. Near duplicates among the samples count once. A copy of training images is
below it; that is what :mod:`evaluate.suite.memorisation` looks for. Only values of one n can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from evaluate.drawing.context import DrawingContext, Rows
from evaluate.drawing.pictures import Picture
from evaluate.metrics.distances import FRECHET_WIDTHS, Distance, cmmd, frechet, frechet_needs, kid
from evaluate.records import BASELINE, MODEL, Metric, Skipped, degenerate_reason
from evaluate.statistics.intervals import MIN_CLUSTERS, more_samples
from evaluate.suite.declaration import SuiteTest

ESTIMATORS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], Distance], str]] = {
    "fd": (frechet, "Frechet distance of fitted Gaussians, biased upwards at every n"),
    "kid": (kid, "unbiased MMD^2, kernel (x y / width + 1)^3; may be negative"),
    "cmmd": (
        cmmd,
        "unbiased MMD^2 x 1000, Gaussian kernel of sigma 10 on unit features; may be negative; sees their mean alone",
    ),
}
INTERVAL = "jackknife over images"


def pictures(context: DrawingContext, config: None = None) -> tuple[list[Picture], list[Skipped]]:
    """Ask for every sample under each of the configured conditions."""
    return context.configured()


def summarise(rows: Rows, context: DrawingContext, config: None = None) -> tuple[list[Metric], list[Skipped]]:
    """Return ``distribution/fd``, ``/kid`` and ``/cmmd`` of each condition, and ``..._above_real``.

    With several noises the value is the mean of one distance for each noise, all at the same n. Baselines: ``real``
    (the floor) and ``mean_image``. What n is too small for is skipped with the number of samples that it lacks.
    """
    if context.judge is None:
        return [], [Skipped("distribution", context.no_judge)]
    keys = context.apart[: len(context.train_features)]
    n, width = len(keys), context.train_features.feature.shape[1]
    needs = {"fd": max(MIN_CLUSTERS, frechet_needs(width)), "kid": MIN_CLUSTERS, "cmmd": MIN_CLUSTERS}
    others = {"mean_image": rows.select(BASELINE, "mean_image")}
    metrics, skipped = [], []
    for name, (measure, estimator) in ESTIMATORS.items():
        if n < needs[name]:
            skipped.append(Skipped(f"distribution/{name}", _too_few(n, needs[name], width)))
            continue
        reference = context.train_features.feature[: n if name == "fd" else None]
        floor = measure(_features(rows.real.values(), keys), reference)
        baselines = {"real": floor.value}
        baselines |= {other: measure(_features(own, keys), reference).value for other, own in others.items()}
        for arm in context.arms:
            settings = context.settings(
                arm.name, arm.guidance, **context.judged, images=n, interval_by=INTERVAL,
                reference=f"{len(reference)} training images",
            )  # fmt: skip
            details = {"settings": settings | {"estimator": estimator, "width": width}, "better": "lower"}
            suffix = "" if arm.name == "all" else f"/{arm.name}"
            names = f"distribution/{name}{suffix}", f"distribution/{name}_above_real{suffix}"
            drawn = rows.select(MODEL, arm.name)
            if reason := degenerate_reason(drawn):
                metrics += [Metric(one, None, n=n, reason=reason, **details) for one in names]
                continue
            seeds = sorted({row["seed"] for row in drawn})
            own = [[row for row in drawn if row["seed"] == seed] for seed in seeds]
            distance = Distance.mean([measure(_features(members, keys), reference) for members in own])
            metrics.append(Metric.of(names[0], distance.interval(), baselines=baselines, **details))
            metrics.append(_above(names[1], distance, floor, details))
    context.extras["distribution"] = {
        "images": n,
        "width": width,
        "judge": context.judge.label,
        "note": "values of another n, encoder or estimator cannot be compared with these",
    }
    return metrics, skipped


def _above(name: str, distance: Distance, floor: Distance, details: dict[str, Any]) -> Metric:
    """Return what the pictures have over real images; where that may be nothing, how many samples would tell."""
    interval = distance.above(floor)
    more = more_samples(interval)
    reason = None if more is None or interval.value < 0 else f"inconclusive, about {more} more samples"
    metric = Metric.of(name, interval, baselines={"real": 0.0}, **details)
    return metric if reason is None else Metric(**{**vars(metric), "reason": reason})


def _too_few(n: int, needed: int, width: int) -> str:
    why = f"{FRECHET_WIDTHS} x {width} features" if needed > MIN_CLUSTERS else "an interval"
    return f"inconclusive, about {needed - n} more samples: {n} pictures, and {needed} are needed for {why}"


def _features(rows: Any, keys: list[str]) -> np.ndarray:
    """Return the judge's features of one picture for each key, float32 (n, width)."""
    by_key = {row["key"]: row["feature"] for row in rows}
    return np.stack([by_key[key] for key in keys])


TEST = SuiteTest(
    name="distribution",
    title="Distribution",
    pictures=pictures,
    summarise=summarise,
    families={
        "distribution/fd": "FD",
        "distribution/kid": "KID",
        "distribution/cmmd": "CMMD",
        "distribution/fd_above_real": "FD above real",
        "distribution/kid_above_real": "KID above real",
        "distribution/cmmd_above_real": "CMMD above real",
    },
    headline=("text",),
    minimised={"distribution": "judge"},
    roles={"distribution": ((), ("real",))},  # no floor: retrieved training images are as near as real ones
    terms=(
        (
            "FD, KID, CMMD",
            "Fréchet distance (Heusel et al. 2017), unbiased KID (Bińkowski et al. 2018) and CMMD (Jayasumana et al. "
            "2024) on the judge's features against training images; the last two may be negative. Only values of the "
            "same n and encoder can be compared: the floor is what the real holdout images score at that n. CMMD's "
            "kernel is so wide (sigma 10, where features are at most 2 apart) that it sees where the mean of the "
            "features is and little else: not the directions in which pictures vary, hardly that they vary too little. "
            "KID and FD see both.",
        ),
    ),
)
