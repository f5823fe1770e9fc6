"""Does the noise still make a difference, and do pictures change for the worse from checkpoint to checkpoint?

Some prompts are drawn from several noises each. Their diversity is the mean distance between the pictures of one
prompt; it is held against pairs of real images (of different prompts), against real images that are much alike, and
against what a JPEG round trip changes. All distances are Euclidean, in two spaces: the judge's unit features and mean
colours. Intervals are by the jackknife over prompts.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
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
from evaluate.records import ATTRIBUTES, BASELINE, MODEL, Metric, Skipped, degenerate_reason, from_table
from evaluate.statistics.intervals import MIN_CLUSTERS, Interval
from evaluate.suite.declaration import Section, SuiteTest
from nanodit.config import Config

GIVEN = ("text", "nothing")  # the first of these that was trained
ALIKE = 3  # real figures are much alike where they share this many of ATTRIBUTES
MIN_PAIRS = 10  # fewer pairs of such figures are no baseline
CHECKPOINTS = 5  # the last ones that a trend is fitted through
STRIPS = 4  # prompts whose pictures are kept for the report
COLUMNS = ("key", "seed", "kind", "condition", "degenerate", *SPACES)


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
    metrics, intervals = [], {}
    for space in spaces:
        found, intervals[space] = _in_space(space, rows, context.step, asked, earlier, settings[space])
        metrics += found
    for key, (seed, label) in itertools.product(asked.keys[:STRIPS], enumerate(asked.labels)):
        context.show(MODEL, label, key, seed)
    context.extras["divergence"] = {
        "condition": asked.arm.name,
        "prompts": asked.keys,
        "labels": asked.labels,  # of the picture of each noise in samples.parquet
        "strips": asked.keys[:STRIPS],  # prompts whose pictures are kept
        "alarms": _alarms(intervals),
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
    keys = context.keys[: config.prompts]
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
    intervals = {"collapse": mean_over_prompts(diversity - round_trip)}
    if earlier:
        steps = [past.step for past in earlier] + [step]
        series = [_drawn(past.rows, asked, space) for past in earlier] + [now]
        along = {**settings, "from_step": steps[0], "to_step": steps[-1], "checkpoints": len(steps)}
        for name, alarm, better in (("diversity", "collapsing", "higher"), ("error", "drift", "lower")):
            intervals[alarm] = mean_over_prompts(trend(steps, np.stack([getattr(one, name) for one in series])))
            details = {"baselines": {"no_change": 0.0}, "settings": along, "better": better}
            metrics.append(Metric.of(f"divergence/{name}_change{end}", intervals[alarm], **details))
    return metrics, intervals


def _alarms(intervals: Mapping[str, Mapping[str, Interval]]) -> list[dict[str, Any]]:
    """Return each alarm with whether it fired: True, False, or None where it cannot be told."""
    alarms = []
    for name, bad in (("collapse", "low"), ("collapsing", "low"), ("drift", "high")):
        own = [intervals.get(space, {}).get(name) for space in SPACES]
        told = all(interval is not None and interval.low is not None for interval in own)
        fired = all(one.high < 0 if bad == "low" else one.low > 0 for one in own) if told else None
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
        own = [metric for metric in report["metrics"] if metric["name"].startswith("divergence/")]
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
    return {"note": note, "groups": groups}


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
    },
    roles={"divergence": (("round_trip", "mean_image"), ("real_pairs", "real"))},
    alarms={
        "collapse": "collapse: the noise makes less difference than a JPEG round trip",
        "collapsing": "collapsing: diversity falls over the checkpoints",
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
