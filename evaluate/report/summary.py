"""The last lines of ``evaluate run``: the headline numbers as a plain table."""

from __future__ import annotations

from collections.abc import Sequence

from evaluate.records import Metric, Skipped
from evaluate.report.obedience import obedience
from evaluate.suite import TESTS, beside, is_charted


def summary(metrics: Sequence[Metric], skipped: Sequence[Skipped]) -> str:
    """Write headline metrics with interval, n, bar and baselines, then what was skipped and why.

    Metrics with a bar, or one per test and condition: the breakdown by attribute and by t stays in the files.
    """
    shown = [metric for metric in metrics if metric.needed is not None or is_headline(metric.name)]
    rows = [("metric", "value", "95 % interval", "n", "needed", "baselines")]
    rows += [_row(metric) for metric in shown]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines += [one.words for one in obedience([metric.to_dict() for metric in metrics])]
    said = [(metric.name, beside(metric.name, metric.value, metric.settings)) for metric in shown]
    lines += [f"{name}: {words}" for name, words in said if words]
    for objective in dict.fromkeys(metric.objective for metric in shown if metric.objective):
        lines.append(f"{objective}: {', '.join(metric.name for metric in shown if metric.objective == objective)}")
    lines += [f"{metric.name}: {metric.reason}" for metric in shown if metric.reason]
    reasons: dict[str, list[str]] = {}
    for one in skipped:
        reasons.setdefault(one.reason, []).append(one.name)
    lines += [f"skipped: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join(lines)


def is_headline(name: str) -> bool:
    """Whether a metric is the one of its test and condition, and no breakdown of it; or heads its family."""
    tests = (test for test in TESTS.values() if test.headline)
    heads = any(name == f"{family}/{test.headline[0]}" for test in tests for family in test.families)
    return (name.count("/") <= 1 or heads) and not is_charted(name)


def _row(metric: Metric) -> tuple[str, ...]:
    interval = "" if metric.low is None else f"[{metric.low:.3g}, {metric.high:.3g}]"
    needed = ""
    if metric.needed is not None:
        needed = f"{'>=' if metric.better == 'higher' else '<='} {metric.needed:g}: {metric.verdict}"
    baselines = ", ".join(f"{name} {value:.3g}" for name, value in metric.baselines.items())
    value = "–" if metric.value is None else f"{metric.value:.3g} {metric.unit}".strip()
    return metric.name, value, interval, str(metric.n), needed, baselines
