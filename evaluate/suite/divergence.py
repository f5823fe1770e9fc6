"""Does the noise still make a difference, and do pictures change for the worse from checkpoint to checkpoint?

Some prompts are drawn from several noises each. Their diversity is the mean distance between the pictures of one
prompt; it is held against pairs of real images (of different prompts), against real images that are much alike, and
against what a JPEG round trip changes. All distances are Euclidean, in two spaces: the judge's unit features and mean
colours. Intervals are by the jackknife over prompts.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from evaluate.drawing.arms import DrawingArm
from evaluate.drawing.context import DrawingContext, Rows
from evaluate.drawing.pictures import Picture
from evaluate.metrics.distances import SPACES, as_points, jackknife, spread
from evaluate.records import (
    ATTRIBUTES,
    BASELINE,
    MODEL,
    Metric,
    Skipped,
    degenerate_reason,
    from_table,
    upgraded,
)
from evaluate.statistics import intervals
from evaluate.statistics.intervals import MIN_CLUSTERS, Interval
from evaluate.suite.declaration import Section, SuiteTest
from nanodit.config import Config
from nanodit.svg import Axes, Series, line_chart

GIVEN = ("text", "nothing")  # the first of these that was trained
ALIKE = 3  # real figures are much alike where they share this many of ATTRIBUTES
MIN_PAIRS = 10  # fewer pairs of such figures are no baseline
CHECKPOINTS = 5  # the last ones that a trend is fitted through
STRIPS = 4  # prompts whose pictures are kept for the report
COLUMNS = ("key", "seed", "kind", "condition", "degenerate", "lpips", *SPACES)
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of LPIPS over the prompts
USUAL = 2  # checkpoints that say what is usual: before fewer, nothing is a spike


class DivergenceConfig(Config):
    """The number of prompts, and of the noises that each is drawn from."""

    prompts: int = Field(default=32, gt=0)
    noises: int = Field(default=4, ge=2)


@dataclass(frozen=True)
class DrawnPoints:
    """The pictures of one checkpoint in one space: (prompts, noises, width), and the real images (prompts, width)."""

    points: np.ndarray
    real: np.ndarray

    @property
    def diversity(self) -> np.ndarray:
        """Mean distance over the pairs of noises of each prompt (prompts,)."""
        pairs = itertools.combinations(range(self.points.shape[1]), 2)
        return np.mean([np.linalg.norm(self.points[:, i] - self.points[:, j], axis=1) for i, j in pairs], axis=0)

    @property
    def error(self) -> np.ndarray:
        """Mean distance of each prompt's pictures to the real image (prompts,)."""
        return np.linalg.norm(self.points - self.real[:, None], axis=2).mean(1)


@dataclass(frozen=True)
class EarlierEvaluation:
    """An earlier evaluation of the run with the same settings: its metrics of this test, and its rows."""

    step: int
    metrics: dict[str, Any]
    rows: Rows


def mean_over_prompts(values: np.ndarray) -> Interval:
    """Return the mean of one value for each prompt, with the jackknife's interval (which is Student's)."""
    whole, without = _mean(values)
    return jackknife(whole, [without], len(values))


def ratio(statistic: tuple[float, np.ndarray], real: tuple[float, np.ndarray]) -> Interval:
    """Return one statistic over another, each with its values without the first, second, ... prompt."""
    return jackknife(statistic[0] / real[0], [statistic[1] / real[1]], len(real[1]))


def trend(steps: Sequence[int], values: np.ndarray) -> np.ndarray:
    """Return how each prompt's value changes from the first to the last step, along the line of least squares.

    ``values`` (checkpoints, prompts), at least two checkpoints. Returns (prompts,).
    """
    x = np.asarray(steps, np.float64)
    x = (x - x.mean()) / np.ptp(x)
    return x @ values / (x @ x)


def pictures(context: DrawingContext, config: DivergenceConfig) -> tuple[list[Picture], list[Skipped]]:
    """Ask for some prompts, each from several noises; those that other tests draw too are the same pictures."""
    asked = _ask(context, config)
    if isinstance(asked, Skipped):
        return [], [asked]
    arm = asked.arm
    return [
        Picture(key, label, arm.subset, arm.guidance, seed)
        for key in asked.keys
        for seed, label in enumerate(asked.labels)
    ], []


def summarise(rows: Rows, context: DrawingContext, config: DivergenceConfig) -> tuple[list[Metric], list[Skipped]]:
    """Return ``divergence/NAME`` in the judge's space and ``divergence/NAME_pixels``, each ``/CONDITION``.

    ``diversity``: over noises. ``ratio``: that over the distance of real images of different prompts. ``variety``: the
    distance between pictures of different prompts over the same of their real images; 1 is as varied as real.
    ``diversity_change`` and ``error_change``: along the last CHECKPOINTS evaluations of this run with equal settings;
    the error is the distance to the sample's real image. Alarms need both spaces: ``collapse`` where the noise makes
    less difference than a JPEG round trip, ``collapsing`` where diversity falls and ``drift`` where the error rises,
    by intervals that exclude zero.

    ``lpips``: the median over prompts of LPIPS to the samples' real images, each the mean over noises; the quantiles of
    every checkpoint go to the extras. ``spike`` is its alarm, see :func:`is_spike`.
    """
    asked = _ask(context, config)
    if isinstance(asked, Skipped):
        return [], []  # named with the pictures
    spaces = SPACES if context.judge else SPACES[1:]
    skipped = [] if context.judge else [Skipped("divergence/diversity", context.no_judge)]
    settings = {space: _settings(context, asked, space) for space in spaces}
    earlier, missing = _earlier(context, asked, settings)
    if missing:
        skipped.append(Skipped("divergence/diversity_change", missing))
    metrics, told = [], {}
    for space in spaces:
        found, told[space] = _in_space(space, rows, context.step, asked, earlier, settings[space])
        metrics += found
    alarms, lpips = _alarms(told), None
    if context.examiner.lpips_label:
        found, lpips, spike = _lpips(rows, context, asked, earlier)
        metrics.append(found)
        alarms.append({"name": "spike", "fired": spike})
    elif context.examiner.no_lpips:
        skipped.append(Skipped("divergence/lpips", context.examiner.no_lpips))
    for key, (seed, label) in itertools.product(asked.keys[:STRIPS], enumerate(asked.labels)):
        context.show(MODEL, label, key, seed)
    context.extras["divergence"] = {
        "condition": asked.arm.name,
        "prompts": asked.keys,
        "labels": asked.labels,  # of the picture of each noise in samples.parquet
        "strips": asked.keys[:STRIPS],  # prompts whose pictures are kept
        "alarms": alarms,
        "lpips": lpips,
        "checkpoints": [{"step": past.step, "metrics": past.metrics} for past in earlier],
    }
    return metrics, skipped


@dataclass(frozen=True)
class _Asked:
    """The pictures of the test: prompts, how they are given, and the condition in samples.parquet of each noise."""

    arm: DrawingArm
    keys: list[str]
    labels: list[str]


def _ask(context: DrawingContext, config: DivergenceConfig) -> _Asked | Skipped:
    """Choose what to draw; skipped where training saw neither text alone nor nothing, or for too few samples."""
    arms = [context.arm(name, test="divergence") for name in GIVEN]
    arm = next((arm for arm in arms if not isinstance(arm, Skipped)), arms[0])
    if isinstance(arm, Skipped):
        return arm
    keys = context.apart[: config.prompts]
    if len(keys) < MIN_CLUSTERS:
        return Skipped("divergence", f"inconclusive, about {MIN_CLUSTERS - len(keys)} more samples")
    # pictures of the noises that other tests take are theirs too, those of further noises carry another label
    labels = [arm.name if seed < context.config.seeds else f"noises/{arm.name}" for seed in range(config.noises)]
    return _Asked(arm, keys, labels)


def _settings(context: DrawingContext, asked: _Asked, space: str) -> dict[str, Any]:
    judged = context.judged if space == "feature" else {}
    drawn = {"prompts": len(asked.keys), "noises": len(asked.labels), "interval_by": "jackknife over prompts"}
    return context.settings(asked.arm.name, asked.arm.guidance, space=space, **drawn, **judged)


def _in_space(
    space: str,
    rows: Rows,
    step: int | None,
    asked: _Asked,
    earlier: Sequence[EarlierEvaluation],
    settings: Mapping[str, Any],
) -> tuple[list[Metric], dict[str, Interval]]:
    """Return the metrics of one space, and by alarm the interval that it reads."""
    end = f"{'' if space == 'feature' else '_pixels'}{'' if asked.arm.name == 'all' else f'/{asked.arm.name}'}"
    if reason := degenerate_reason(_pick(rows, asked)):
        details = {"n": len(asked.keys), "settings": settings, "reason": reason}
        return [Metric(f"divergence/{name}{end}", None, **details) for name in ("diversity", "ratio", "variety")], {}
    now, points = _drawn(rows, asked, space), partial(_points, keys=asked.keys, space=space)
    diversity, real = now.diversity, spread(now.real)
    round_trip = np.linalg.norm(points(rows.select(BASELINE, "round_trip")) - now.real, axis=1)
    distances = {"real_pairs": real[0], "round_trip": float(round_trip.mean())}
    if (alike := _alike(rows, space)) is not None:
        distances["real_alike"] = alike
    ratios = {name: distance / real[0] for name, distance in distances.items()}
    varied = {"real": 1.0, "mean_image": spread(points(rows.select(BASELINE, "mean_image")))[0] / real[0]}
    found = {
        "diversity": (mean_over_prompts(diversity), distances),
        "ratio": (ratio(_mean(diversity), real), ratios),
        "variety": (ratio(spread(now.points[:, 0]), real), varied),
    }
    metrics = [
        Metric.of(f"divergence/{name}{end}", interval, baselines=baselines, settings=settings)
        for name, (interval, baselines) in found.items()
    ]
    told = {"collapse": mean_over_prompts(diversity - round_trip)}
    if earlier:
        steps = [past.step for past in earlier] + [step]
        series = [_drawn(past.rows, asked, space) for past in earlier] + [now]
        along = {**settings, "from_step": steps[0], "to_step": steps[-1], "checkpoints": len(steps)}
        for name, alarm, better in (("diversity", "collapsing", "higher"), ("error", "drift", "lower")):
            told[alarm] = mean_over_prompts(trend(steps, np.stack([getattr(one, name) for one in series])))
            details = {"baselines": {"no_change": 0.0}, "settings": along, "better": better}
            metrics.append(Metric.of(f"divergence/{name}_change{end}", told[alarm], **details))
    return metrics, told


def is_spike(now: Interval, before: Sequence[Interval]) -> bool | None:
    """Whether the median LPIPS jumped: its whole 95 % interval lies above those of all preceding checkpoints.

    Prompts differ more than checkpoints of a steady run do, so wobble stays within these intervals. None where fewer
    than USUAL checkpoints come before, or any of them, or this one, has no interval.
    """
    if len(before) < USUAL or any(one.low is None for one in (now, *before)):
        return None
    return now.verdict(max(one.high for one in before), "lower") == "missed"


def _lpips(
    rows: Rows, context: DrawingContext, asked: _Asked, earlier: Sequence[EarlierEvaluation]
) -> tuple[Metric, dict[str, Any] | None, bool | None]:
    """Return the median of LPIPS, its quantiles at every checkpoint, and whether it jumped."""
    name = f"divergence/lpips{'' if asked.arm.name == 'all' else f'/{asked.arm.name}'}"
    others = {**rows.without_skill, "round_trip": rows.select(BASELINE, "round_trip")}
    baselines = {label: float(np.median(found)) for label, own in others.items() if (found := _known(own, asked.keys))}
    settings = {**_settings(context, asked, "lpips"), **context.lpips, "interval_by": "bootstrap over prompts"}
    details = {"baselines": baselines, "settings": settings, "better": "lower"}
    if reason := degenerate_reason(_pick(rows, asked)):
        return Metric(name, None, n=len(asked.keys), reason=reason, **details), None, None
    past = [(one.step, values) for one in earlier if (values := _per_prompt(one.rows, asked)) is not None]
    if (values := _per_prompt(rows, asked)) is None:
        return Metric(name, None, n=len(asked.keys), reason="LPIPS of a picture is no number", **details), None, None
    before = [intervals.quantile(own, 0.5) for _, own in past]
    now = intervals.quantile(values, 0.5)
    steps = [
        {"step": step, "n": len(own), "values": np.quantile(own, QUANTILES).tolist(), "low": one.low, "high": one.high}
        for (step, own), one in zip([*past, (context.step, values)], [*before, now])
    ]
    return Metric.of(name, now, **details), {"quantiles": list(QUANTILES), "steps": steps}, is_spike(now, before)


def _known(rows: Iterable[Mapping[str, Any]], keys: Collection[str]) -> list[float]:
    return [row["lpips"] for row in rows if row["key"] in keys and row["lpips"] is not None]


def _per_prompt(rows: Rows, asked: _Asked) -> np.ndarray | None:
    """Return the LPIPS of each prompt, the mean over its noises (prompts,); None where any picture has none."""
    by_key: dict[str, list[float]] = {key: [] for key in asked.keys}
    for row in _pick(rows, asked):
        by_key[row["key"]].append(row["lpips"])
    values = [by_key[key] for key in asked.keys]
    return None if any(None in own for own in values) else np.mean(values, axis=1)


def _alarms(told: Mapping[str, Mapping[str, Interval]]) -> list[dict[str, Any]]:
    """Return each alarm with whether it fired: True, False, or None where it cannot be told."""
    alarms = []
    for name, bad in (("collapse", "low"), ("collapsing", "low"), ("drift", "high")):
        own = [told.get(space, {}).get(name) for space in SPACES]
        known = all(interval is not None and interval.low is not None for interval in own)
        fired = all(one.high < 0 if bad == "low" else one.low > 0 for one in own) if known else None
        alarms.append({"name": name, "fired": fired})
    return alarms


def _earlier(
    context: DrawingContext, asked: _Asked, settings: Mapping[str, Mapping[str, Any]]
) -> tuple[list[EarlierEvaluation], str | None]:
    """Return the last CHECKPOINTS - 1 earlier evaluations of this run with the same ``settings``; or none, and why."""
    if context.run_folder is None or context.step is None:
        return [], "the run of this checkpoint is not known"
    found = []
    for folder in sorted(Path(context.run_folder, "validation_outputs").glob("step-*")):
        record = _read_report(folder)
        if record and record["step"] < context.step and settings.items() <= record["settings"].items():
            found.append((record["step"], folder, record["metrics"]))
    series = []
    for step, folder, metrics in sorted(found, key=lambda one: one[0])[1 - CHECKPOINTS :]:
        rows = _read_rows(folder / "samples.parquet", asked)
        if rows is not None:
            series.append(EarlierEvaluation(step, metrics, rows))
    return series, None if series else "this run has no earlier evaluation with these settings in validation_outputs"


def _read_report(folder: Path) -> dict[str, Any] | None:
    """Return Step, metrics of this test and by space its settings, of a finished evaluation; None where it has none."""
    try:
        report = json.loads((folder / "report.json").read_text())
        own = [upgraded(metric) for metric in report["metrics"] if metric["name"].startswith("divergence/")]
        return {
            "step": report["provenance"]["step"],
            "metrics": {one["name"]: {name: one[name] for name in ("value", "low", "high", "n")} for one in own},
            "settings": {one["settings"]["space"]: one["settings"] for one in own if "_change" not in one["name"]},
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_rows(path: Path, asked: _Asked) -> Rows | None:
    """Return the rows of the prompts' real and drawn pictures; None where any is missing or cannot be scored."""
    try:
        table = pq.read_table(path, columns=list(COLUMNS), filters=[("condition", "in", ["real", *asked.labels])])
    except (OSError, ValueError, pa.ArrowException):
        return None
    rows = Rows(from_table(table))
    drawn = _pick(rows, asked)
    whole = len(drawn) == len(asked.keys) * len(asked.labels) and rows.real.keys() >= set(asked.keys)
    return rows if whole and not degenerate_reason(drawn) else None


def _pick(rows: Rows, asked: _Asked) -> list[Mapping[str, Any]]:
    """Return the pictures of the test, one for each prompt and noise."""
    keys = set(asked.keys)
    return [
        row for seed, label in enumerate(asked.labels) for row in rows.select(MODEL, label, seed) if row["key"] in keys
    ]


def _drawn(rows: Rows, asked: _Asked, space: str) -> DrawnPoints:
    points = [_points(rows.select(MODEL, label, seed), asked.keys, space) for seed, label in enumerate(asked.labels)]
    return DrawnPoints(np.stack(points, axis=1), _points(rows.real.values(), asked.keys, space))


def _points(rows: Iterable[Mapping[str, Any]], keys: Sequence[str], space: str) -> np.ndarray:
    """Return One picture of each key in a space: (keys, width)."""
    by_key = {row["key"]: row[space] for row in rows}
    return as_points(np.stack([by_key[key] for key in keys]), space)


def _mean(values: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean, and the mean without each value."""
    return float(values.mean()), (values.sum() - values) / (len(values) - 1)


def _alike(rows: Rows, space: str) -> float | None:
    """Return the mean distance of real figures that share ALIKE attributes; None where there are not enough."""
    real = [row for row in rows.real.values() if row[f"{ATTRIBUTES[0]}_true"] is not None]
    if len(real) < 2:
        return None
    points = as_points(np.stack([row[space] for row in real]), space)
    truths = np.array([[row[f"{name}_true"] for name in ATTRIBUTES] for row in real])
    first, second = np.triu_indices(len(real), 1)
    alike = (truths[first] == truths[second]).sum(1) >= ALIKE
    if alike.sum() < MIN_PAIRS:
        return None
    return float(np.linalg.norm(points[first[alike]] - points[second[alike]], axis=1).mean())


def strips(page: Any) -> dict[str, Any] | None:
    """Return pictures of a few prompts from several noises each."""
    extra = page.extras("divergence")
    if not extra or not extra["strips"]:
        return None
    groups = []
    for key in extra["strips"]:
        noises = [page.drawn(label, key, seed, f"noise {seed}") for seed, label in enumerate(extra["labels"])]
        groups.append(
            {"caption": page.caption(key), "pictures": [*([page.real(key)] if page.kept(key) else []), *noises]}
        )
    note = f"Given {page.words(extra['condition'])}; {len(groups)} of {len(extra['prompts'])} prompts."
    return {"note": note, "groups": groups, "chart": lpips_chart(extra.get("lpips"))}


def lpips_chart(lpips: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Draw the quantiles of LPIPS over the steps of the run; None where there are fewer than two."""
    if not lpips or len(lpips["steps"]) < 2:
        return None
    lowest, *inner, highest = zip(*(one["values"] for one in lpips["steps"]))
    steps = [one["step"] for one in lpips["steps"]]
    middle = len(inner) // 2
    series = [Series(f"{q:.0%}", list(zip(steps, own)), "b1") for q, own in zip(lpips["quantiles"][1:], inner)]
    series[middle] = Series("median", list(zip(steps, inner[middle])), "c1", list(zip(steps, lowest, highest)), True)
    shares = [f"{100 * lpips['quantiles'][place]:.0f}" for place in (0, -1)]
    title = f"LPIPS to the real image: median, quartiles, and the band of {shares[0]} to {shares[1]} % of the prompts"
    return {"title": title, "svg": line_chart(series, Axes("step", "LPIPS"))}


TEST = SuiteTest(
    name="divergence",
    title="Divergence",
    pictures=pictures,
    summarise=summarise,
    config=DivergenceConfig,
    families={
        "divergence/diversity": "Diversity over noises",
        "divergence/ratio": "Diversity / pairs of real images",
        "divergence/variety": "Variety over prompts / real",
        "divergence/diversity_change": "Diversity, change over checkpoints",
        "divergence/error_change": "Distance to real, change over checkpoints",
        "divergence/lpips": "LPIPS to the real image, median over prompts",
    },
    minimised={"divergence": "judge", "divergence/lpips": "lpips"},
    roles={
        "divergence/lpips": (None, ("round_trip",)),
        "divergence/variety": ((), ("real",)),  # no floor: retrieved training images vary as real ones do
        "divergence": (("round_trip", "mean_image"), ("real_pairs", "real")),
    },
    alarms={
        "collapse": "collapse: the noise makes less difference than a JPEG round trip",
        "collapsing": "collapsing: diversity falls over the checkpoints",
        "spike": "spike: LPIPS jumped above the intervals of the checkpoints before",
        "drift": "drift: pictures move away from the real ones over the checkpoints",
    },
    terms=(
        (
            "Divergence",
            "Diversity: the mean distance between pictures of one prompt from several noises. Collapse needs two "
            "spaces to agree: the judge's features and 16 × 16 mean colours.",
        ),
    ),
    section=Section(
        "Diversity",
        "What the noise changes: each strip is one prompt drawn from several noises, the first prompts in the order "
        "of their keys.",
        strips,
    ),
)
