"""Whether two numbers may be compared at all, and by how much they differ where they may.

A metric of one evaluation is compared with the same metric of another only where everything that it depends on beside
the model is equal: data, images, noises, sampler, guidance, size, judges and the metric's own version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluate import statistics
from evaluate.records import MODEL, select
from evaluate.statistics import Interval

FACTS = ("fingerprint", "base", "encoders")  # of the dataset, in a report's provenance


def objections(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Why nothing of two reports (contents of report.json) may be compared; empty where metrics may be."""
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
    """How entries of report.json under one name differ in n or settings: ``steps 10, 16``; empty where they do not."""
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
    """A setting as text; of a hash the beginning."""
    text = "unknown" if value is None else str(value)
    return text[:16] if len(text) == 64 else text


def paired(
    samples: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]], condition: str, column: str
) -> Interval | None:
    """Mean of ``column`` in ``samples`` less that in ``others``, picture by picture from the same noise.

    Rows of two samples.parquet whose metrics are not :func:`differing`. None where the pictures are not the same ones,
    or any of them has no value.
    """
    sides = [
        {(row["key"], row["seed"]): row[column] for row in select(rows, MODEL, condition)} for rows in (samples, others)
    ]
    values = [[side[name] for name in sorted(side)] for side in sides]
    if not sides[0] or sides[0].keys() != sides[1].keys() or None in values[0] + values[1]:
        return None
    if not np.isfinite(values).all():
        return None
    return statistics.paired_difference(*values, [key for key, _ in sorted(sides[0])])
