"""The report's curves: training and validation over steps and over time, and the held-out error by noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from evaluate.report.compare import differing, objections
from evaluate.report.files import Run
from evaluate.report.metrics import baseline_name, condition_order, headline_of, label, metric_order, part_name
from evaluate.suite import is_charted
from evaluate.suite.heldout_loss import NOISY_FROM, PREDICTORS, shares
from nanodit.svg import Axes, Series, line_chart, smooth, thin

PREDICTOR_STYLES = {"mean_image": "b1", "identity": "b2", "affine": "b3"}
NARROW = 340
RATE = "sys/iter_per_sec"
TAGS = (  # of metrics.jsonl: title, log axis, noisy
    ("train/loss", "training loss", True, True),
    ("validation/heldout_error", "held-out error while training", True, False),
    ("validation/heldout_loss", "held-out loss while training", True, False),
    ("train/learning_rate", "learning rate", False, False),
    ("train/grad_norm", "gradient norm", True, True),
)
CHARTS = 12  # metrics drawn over the run's evaluations


def minutes(records: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return the minutes of training up to each logged step, from the steps per second that the run recorded.

    As the rates do, they leave out validation, saving and compilation. A step without a rate takes that of the next one
    that has, or of the last. Empty where the run recorded none.
    """
    rates = [record.get(RATE) for record in records]
    following = next((rate for rate in reversed(rates) if rate), None)
    if following is None:
        return {}
    for index in reversed(range(len(rates))):
        following = rates[index] = rates[index] or following
    clock, step, found = 0.0, 0, {}
    for record, rate in zip(records, rates):
        clock += max(0, record["step"] - step) / rate / 60
        step = record["step"]
        found[step] = clock
    return found


def training_charts(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Draw what was logged in training, over the steps and, where the run recorded its speed, over time."""
    logs = [(run, run.files.metrics_log or run.files.curves) for run in runs]
    clocks = {run.letter: minutes(log) for run, log in logs}
    charts = []
    for tag, title, log_axis, noisy in TAGS:
        own = {run: [(one["step"], one[tag]) for one in log if tag in one] for run, log in logs}
        own = {run: points for run, points in own.items() if len(points) > 1}
        if not own:
            continue
        charts.append({"title": title, "svg": _lines(own, Axes("step", title, log=log_axis, width=NARROW), noisy)})
        timed = {
            run: [(clocks[run.letter][step], value) for step, value in points if step in clocks[run.letter]]
            for run, points in own.items()
        }
        timed = {run: points for run, points in timed.items() if len(points) > 1}
        if timed and tag != "train/learning_rate":
            axes = Axes("minutes of training", title, log=log_axis, width=NARROW)
            charts.append({"title": f"{title}, over time", "svg": _lines(timed, axes, noisy)})
    untimed = [run.letter or "this run" for run, log in logs if log and not clocks[run.letter]]
    return {"charts": charts, "untimed": untimed} if charts else None


def _lines(points: Mapping[Run, Sequence[tuple[float, float]]], axes: Axes, noisy: bool) -> Any:
    series = []
    for run, own in points.items():
        if noisy:
            # beside other runs the raw curve would hide them
            series += [Series(run.name, thin(own), "faint")] if len(points) == 1 else []
            own = smooth(own, len(own) // 20)
        series.append(Series(run.name, thin(own), run.style, markers=not noisy and len(own) <= 40))
    return line_chart(series, axes)


def history_charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Draw headline metrics over the evaluations of a run with equal settings, over the steps and over time."""
    series: dict[str, dict[Run, list[tuple[int, Mapping[str, Any]]]]] = {}
    for run in runs:
        earlier = {step: {one["name"]: one for one in metrics} for step, metrics in run.files.earlier.items()}
        for metric in _headline_metrics(run):
            name = metric["name"]
            now = (run.files.provenance.get("step", 0), metric)
            points = [*((step, earlier[step][name]) for step in sorted(earlier) if name in earlier[step]), now]
            points = [(step, one) for step, one in points if one["value"] is not None]
            if len(points) > 1:
                series.setdefault(name, {})[run] = points
    charts = []
    for name, own in list(series.items())[:CHARTS]:
        title, part, _ = label(name)
        members = [points[-1][1] for points in own.values()]
        if differing(members):
            continue
        svgs = [
            line_chart([_banded(run, points, None) for run, points in own.items()], Axes("step", title, width=NARROW))
        ]
        clocks = {run: minutes(run.files.metrics_log) for run in own}
        timed = {run: [one for one in points if one[0] in clocks[run]] for run, points in own.items()}
        if all(len(points) > 1 for points in timed.values()):
            axes = Axes("minutes of training", title, width=NARROW)
            svgs.append(line_chart([_banded(run, points, clocks[run]) for run, points in timed.items()], axes))
        charts += [{"title": f"{title}, {part}", "svg": svg} for svg in svgs]
    return charts


def _headline_metrics(run: Run) -> list[Mapping[str, Any]]:
    """Return the metric that stands for each family."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for metric in sorted(run.files.metrics, key=metric_order):
        if not is_charted(metric["name"]):
            found.setdefault(label(metric["name"])[0], []).append(metric)
    return [headline_of(rows, run.files.metrics) for rows in found.values()]


def _banded(run: Run, points: Sequence[tuple[int, Mapping[str, Any]]], clock: Mapping[int, float] | None) -> Series:
    places = [(step if clock is None else clock[step], metric) for step, metric in points]
    band = [(x, metric["low"], metric["high"]) for x, metric in places if metric["low"] is not None]
    return Series(run.name, [(x, metric["value"]) for x, metric in places], run.style, band, markers=True)


def heldout_charts(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Draw the error by t against the trivial predictors, and the ratio to the best; None where nothing was measured.

    Of one run for every condition; of several, for each condition that all measured in the same way, run beside run.
    """
    measured = [(run, _bins(run)) for run in runs]
    measured = [(run, bins) for run, bins in measured if bins]
    if not measured:
        return None
    if len(measured) == 1:
        ((run, bins),) = measured
        lines = [
            (part_name(condition), f"c{min(index, 5) + 1}", own, shares(run.files.heldout, condition))
            for index, (condition, own) in enumerate(bins.items())
        ]
        return {"blocks": [_block("", lines, run)], "apart": []}
    blocks, apart = [], []
    for condition in dict.fromkeys(name for _, bins in measured for name in bins):
        members = [(run, bins[condition]) for run, bins in measured if condition in bins]
        first, own = members[0]
        alike = [
            (run, other)
            for run, other in members
            if run is first or not (objections(first.files.report, run.files.report) or _unlike(own, other))
        ]
        if len(alike) > 1:
            lines = [(run.name, run.style, other, shares(run.files.heldout, condition)) for run, other in alike]
            blocks.append(_block(part_name(condition), lines, first))
        apart += [f"{run.letter} given {part_name(condition)}" for run, _ in members if run not in dict(alike)]
    return {"blocks": blocks, "apart": apart}


def _bins(run: Run) -> dict[str, list[Mapping[str, Any]]]:
    """Return by condition the errors at rising t."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for metric in run.files.metrics:
        if metric["name"].startswith("heldout_mse/") and metric["value"] is not None:
            found.setdefault(metric["settings"]["conditions"], []).append(metric)
    return {name: sorted(found[name], key=_middle) for name in sorted(found, key=condition_order)}


def _unlike(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
    return len(one) != len(other) or any(differing(pair) for pair in zip(one, other))


def _block(
    title: str, lines: Sequence[tuple[str, str, Sequence[Mapping[str, Any]], Sequence[float]]], run: Run
) -> dict[str, Any]:
    """Return charts and the table of some lines: name, style, the errors at rising t, their shares of the loss."""
    trivial = lines[0][2]
    errors = [
        Series(baseline_name(name), [(_middle(m), m["baselines"][name]) for m in trivial], PREDICTOR_STYLES[name])
        for name in PREDICTORS
    ]
    ratios = []
    for name, style, own, _ in lines:
        band = [(_middle(m), m["low"], m["high"]) for m in own if m["low"] is not None]
        errors.append(Series(name, [(_middle(m), m["value"]) for m in own], style, band, markers=True))
        ratio = [(_middle(m), m["value"] / min(m["baselines"].values())) for m in own]
        ratios.append(Series(name, ratio, style, markers=True))
    needed = next((m["needed"] for m in run.files.metrics if m["name"] == "heldout_ratio/all"), None)
    axes = Axes("t (1 is noise)", "mean squared error", log=True, span=(0.0, 1.0))
    gated = replace(axes, y="error / best trivial error", line=needed, line_name="needed", shaded=(NOISY_FROM, 1.0))
    if needed is None:
        gated = replace(gated, line=1.0, line_name="best trivial", shaded=None)
    shown = (*errors[len(PREDICTORS) :], *errors[: len(PREDICTORS)])
    return {
        "title": title,
        "error": line_chart(errors, axes),
        "ratio": line_chart(ratios, gated),
        "legend": [(series.name, series.style) for series in shown],
        "names": [name for name, *_ in lines],
        "table": _table([(own, of_loss) for *_, own, of_loss in lines]),
    }


def _table(columns: Sequence[tuple[Sequence[Mapping[str, Any]], Sequence[float]]]) -> list[dict[str, Any]]:
    """Return a row for each bin of any column (errors, shares of the loss); None in a cell without a value."""

    def span(metric: Mapping[str, Any]) -> tuple[float, float]:
        return metric["settings"]["t_low"], metric["settings"]["t_high"]

    cells = []
    for own, of_loss in columns:
        known = of_loss if len(of_loss) == len(own) else [None] * len(own)
        cells.append({span(metric): {"metric": metric, "share": share} for metric, share in zip(own, known)})
    spans = sorted({place for column in cells for place in column})
    return [{"t": f"{low:.2g} to {high:.2g}", "cells": [one.get((low, high)) for one in cells]} for low, high in spans]


def _middle(metric: Mapping[str, Any]) -> float:
    return (metric["settings"]["t_low"] + metric["settings"]["t_high"]) / 2
