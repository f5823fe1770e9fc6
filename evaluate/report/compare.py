"""Whether two numbers may be compared at all, and by how much they differ where they may.

A metric of one evaluation is compared with the same metric of another only where everything that it depends on beside
the model is equal: data, images, noises, sampler, guidance, size, judges and the metric's own version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from evaluate.records import MODEL, ROUNDING, cluster_of, select
from evaluate.statistics import intervals
from evaluate.statistics.intervals import Interval, more_samples
from evaluate.suite import TESTS
from evaluate.suite.declaration import Values

FACTS = ("fingerprint", "base", "encoders")  # of the dataset, in a report's provenance


class MeasuredRows(Protocol):
    """The rows of samples.parquet and heldout_loss.parquet."""

    samples: list[dict[str, Any]]
    heldout: list[dict[str, Any]]


def objections(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return why nothing of two reports (contents of report.json) may be compared; empty where metrics may be."""
    found = []
    if one["schema"] != other["schema"]:
        found.append(f"schema {one['schema']} and {other['schema']}")
    datasets = [report["provenance"]["dataset"] for report in (one, other)]
    for name in FACTS:
        here, there = (_short(dataset.get(name)) for dataset in datasets)
        if here != there or here == "unknown":
            found.append(f"dataset {name} {here} and {there}")
    return found


def differing(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return how entries of report.json under one name differ in n or settings (``steps 10, 16``), or nothing."""
    return [
        f"{name} {', '.join(dict.fromkeys(values))}"
        for name, values in _columns(metrics).items()
        if len(set(values)) > 1
    ]


def _columns(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    names = sorted({name for metric in metrics for name in metric["settings"]})
    columns = {"n": [str(metric["n"]) for metric in metrics]}
    return columns | {name: [_short(metric["settings"].get(name)) for metric in metrics] for name in names}


def _short(value: Any) -> str:
    """Return a setting as text; of a hash the beginning."""
    text = "unknown" if value is None else str(value)
    return text[:16] if len(text) == 64 else text


def paired(
    samples: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]], condition: str, column: str
) -> Interval | None:
    """Return the mean of ``column`` in ``samples`` less that in ``others``, picture by picture from the same noise.

    Rows of two samples.parquet whose metrics are not :func:`differing`. Over the pictures, (sample, seed), that both
    have; None where there are none, or any of them has no value.
    """
    chosen = [select(rows, MODEL, condition) for rows in (samples, others)]
    sides = [{(row["key"], row["seed"]): (row[column], 1) for row in rows} for rows in chosen]
    return _paired(*sides, _clusters(*chosen))


@dataclass(frozen=True)
class Difference:
    """The advantage of one evaluation over another in a metric, picture by picture."""

    interval: Interval
    better: str

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` where the interval excludes zero and rounding does not explain it."""
        low, high = self.interval.low, self.interval.high
        if low is None or low <= 0 <= high or max(abs(low), abs(high)) <= ROUNDING:
            return "inconclusive"
        return "better" if (self.interval.value > 0) == (self.better == "higher") else "worse"

    @property
    def more(self) -> int | None:
        """About how many more samples would tell, were the difference the truth; None where that cannot be said."""
        return more_samples(self.interval)


def difference(metric: Mapping[str, Any], one: MeasuredRows, other: MeasuredRows) -> Difference | None:
    """Return what ``one`` has over ``other`` in a metric of both that is not :func:`differing`.

    None where the metric is no mean over pictures or grid points, or any of these has no value.
    """
    sides = [values_of(metric["name"], evidence) for evidence in (one, other)]
    clusters = _clusters(*((*evidence.samples, *evidence.heldout) for evidence in (one, other)))
    interval = _paired(*sides, clusters) if None not in sides else None
    return interval and Difference(interval, metric["better"])


def values_of(name: str, evidence: MeasuredRows) -> Values | None:
    """Return the pictures or grid points that a metric is a mean or a pooled share of; None for other metrics."""
    test = next((test for test in TESTS.values() if test.owns(name)), None)
    return test.values(name, evidence) if test and test.values else None


def _clusters(rows: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the cluster of every sample (key -> cluster): of two evaluations, the one that knows of groups decides."""
    own, theirs = ({row["key"]: cluster_of(row) for row in one if row.get("cluster")} for one in (rows, others))
    return {row["key"]: row["key"] for one in (rows, others) for row in one} | theirs | own


def _paired(values: Values, others: Values, clusters: Mapping[str, str]) -> Interval | None:
    common = sorted(values.keys() & others.keys())
    pairs = [(values[name], others[name]) for name in common]
    if not pairs or any(one[0] is None or other[0] is None or one[1] != other[1] for one, other in pairs):
        return None
    differences = np.array([one[0] - other[0] for one, other in pairs], np.float64)
    if not np.isfinite(differences).all():
        return None
    return intervals.ratio(differences, [one[1] for one, _ in pairs], [clusters[name[0]] for name in common])
