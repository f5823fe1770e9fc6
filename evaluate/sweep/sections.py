"""The sections of a sweep's page below its verdicts: curves, equal steps and time, cost, effects, trials, cohorts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evaluate.statistics.verdicts import MIN_SEEDS
from evaluate.sweep.analysis import AtEqual, Cohort, Factorial, band, flatten, front, measure_of, rate
from evaluate.sweep.files import VALIDATION, RecordedSweep
from evaluate.sweep.views import WHY_NO_TIME, forest, scale, styles
from evaluate.sweep.words import digits, duration, metric_title, p_words, setting, words_of
from nanodit.svg import Axes, Point, Series, line_chart, scatter, smooth, thin

NARROW = 340
AXES = {"step": "step", "minutes": "minutes of training", "images": "images seen"}


def curve_charts(sweep: RecordedSweep, cohort: Cohort) -> dict[str, Any]:
    """Draw losses over steps, minutes and images: the mean over the seeds, and the range of the seeds as a band."""
    charts, why = [], []
    for axis, words in AXES.items():
        if axis == "minutes" and not sweep.time_claims:
            why.append(f"Over time: {WHY_NO_TIME}.")
            continue
        for tag, title, noisy in ((VALIDATION, "held-out error", False), ("train/loss", "training loss", True)):
            if noisy and axis == "images":
                continue  # the same picture as over the steps
            series = []
            for arm in sweep.arms:
                curves = [trial.curve(tag, axis) for trial in cohort.of(arm)]
                curves = [smooth(points, max(1, len(points) // 10)) if noisy else points for points in curves]
                points, spread = band([points for points in curves if len(points) > 1])
                if points:
                    shown = [point for point in spread if point[0] in {x for x, _ in thin(points)}]
                    markers = not noisy and len(points) <= 30
                    series.append(Series(arm, thin(points), styles(sweep)[arm], shown, markers))
            if series:
                axes = Axes(words, title, log=True, width=NARROW)
                smoothed = ", smoothed" if noisy else ""
                charts.append({"title": f"{title} over {words}{smoothed}", "svg": line_chart(series, axes)})
            elif axis == "step":
                why.append(f"{title[0].upper()}{title[1:]}: no finished trial logged one.")
            elif not noisy and charts:
                why.append(f"Held-out error over {words}: not recorded.")
    return {"charts": charts, "why": why}


def equal_tables(sweep: RecordedSweep, equal: Mapping[str, AtEqual | None]) -> list[dict[str, Any]]:
    """Compare the held-out error at equal steps and at equal time, or say why not."""
    tables = []
    for axis, title in (("step", "At equal steps"), ("minutes", "At equal time")):
        found, why = equal[axis], ""
        if axis == "minutes" and not sweep.time_claims:
            found, why = None, WHY_NO_TIME[0].upper() + WHY_NO_TIME[1:] + "."
        elif found is None:
            why = "No finished trial logged a held-out error" + (" and a rate." if axis == "minutes" else ".")
        if found is None:
            tables.append({"title": title, "why": why, "rows": [], "at": ""})
            continue
        at = f"step {found.at:,.0f}" if axis == "step" else f"{digits(found.at)} minutes of training"
        rows = []
        for one in found.contrasts:
            own = list(found.values[one.arm.name].values())
            compared = one.comparison
            rows.append(
                {
                    "arm": one.arm.name,
                    "against": one.against,
                    "mean": digits(math.fsum(own) / len(own)) if own else "–",
                    "difference": words_of(compared.interval) if compared else "–",
                    "word": one.verdict.word,
                    "n": compared.interval.n if compared else 0,
                }
            )
        tables.append({"title": title, "at": at, "rows": rows, "why": ""})
    return tables


def pareto_charts(sweep: RecordedSweep, cohort: Cohort) -> dict[str, Any]:
    """Draw the primary metric against training time and peak memory: means over seeds, with their range."""
    charts, why = [], []
    costs = (
        ("seconds", "minutes of training", 60.0, sweep.time_claims, f"Time: {WHY_NO_TIME}."),
        ("peak_memory_gb", "peak memory, GB", 1.0, sweep.memory_claims, "Memory: trials shared a device by fractions."),
    )
    quality = measure_of(sweep.primary)
    for name, words, unit, allowed, reason in costs:
        if not allowed:
            why.append(reason)
            continue
        points = []
        for arm, style in styles(sweep).items():
            if arm in sweep.arms and sweep.arms[arm].role == "a/a":
                continue  # the baseline's place again
            pairs = [(trial.number(name), quality(trial)) for trial in cohort.of(arm)]
            pairs = [(cost / unit, value) for cost, value in pairs if cost is not None and value is not None]
            if pairs:
                xs, ys = zip(*pairs)
                ranges = ((min(xs), max(xs)), (min(ys), max(ys)))
                points.append(Point(arm, style, math.fsum(xs) / len(xs), math.fsum(ys) / len(ys), *ranges))
        if not points:
            why.append(f"{words[0].upper()}{words[1:]}: not recorded by any finished trial.")
            continue
        best = front({point.name: (point.x, point.y) for point in points}, sweep.mode)
        title = metric_title(sweep.primary)
        charts.append({"title": f"{title} against {words}", "svg": scatter(points, best, words, title), "front": best})
    return {"charts": charts, "why": why}


def effect_rows(sweep: RecordedSweep, found: Factorial) -> dict[str, Any]:
    """Return main effects and interactions with their intervals on one scale, or why there are none."""
    bounds = scale([effect.comparison.interval for effect in found.effects])
    rows = []
    for effect, adjusted in zip(found.effects, found.adjusted):
        interval = effect.comparison.interval
        word = "inconclusive"
        if adjusted is not None and adjusted <= 0.05 and interval.n >= MIN_SEEDS:
            word = "better" if (interval.value < 0) == (sweep.mode == "min") else "worse"
        rows.append(
            {
                "name": " × ".join(effect.factors),
                "interaction": len(effect.factors) > 1,
                "difference": words_of(interval),
                "n": interval.n,
                "p": p_words(adjusted),
                "word": word,
                "forest": forest(effect.comparison, bounds, None),
            }
        )
    return {"rows": rows, "why": found.reason}


def trial_rows(sweep: RecordedSweep) -> list[dict[str, Any]]:
    """Put every trial on a common line of time, with how it ended and why."""
    spans = [(trial.number("started"), trial.number("ended")) for trial in sweep.trials]
    starts, ends = [start for start, _ in spans if start is not None], [end for _, end in spans if end is not None]
    first, last = (min(starts), max([*ends, *starts])) if starts else (0.0, 0.0)
    whole = (last - first) or 1.0
    rows = []
    for trial, (start, end) in zip(sweep.trials, spans):
        bar = None
        if start is not None:
            bar = {"left": (start - first) / whole, "width": max(0.003, ((end or last) - start) / whole)}
        wall = duration(end - start) if start is not None and end is not None else "–"
        reason = trial.reason or ("" if trial.status != "finished" else trial.excluded(sweep.primary) or "")
        rows.append(
            {
                "arm": trial.arm,
                "seed": trial.seed,
                "status": trial.status,
                "reason": reason,
                "attempts": trial.record.get("attempts"),
                "steps": trial.number("steps"),
                "wall": wall,
                "trained_by": trial.record.get("trained_by"),
                "bar": bar,
            }
        )
    return rows


def cost_rows(sweep: RecordedSweep) -> dict[str, Any]:
    """Return what each arm took, by the clock, and what was spent on trials that take no part."""
    rows, total, lost = [], 0.0, 0.0
    for arm in dict.fromkeys(trial.arm for trial in sweep.trials):
        own = [trial for trial in sweep.trials if trial.arm == arm]
        finished = [trial for trial in own if trial.status == "finished"]
        spans = [(trial, trial.number("started"), trial.number("ended")) for trial in own]
        walls = [(trial, end - start) for trial, start, end in spans if start is not None and end is not None]
        seconds = [value for trial in finished if (value := trial.number("seconds")) is not None]
        memory = [value for trial in own if (value := trial.number("peak_memory_gb")) is not None]
        rates = [value for trial in finished if (value := rate(trial)) is not None]
        total += sum(wall for _, wall in walls)
        lost += sum(wall for trial, wall in walls if trial.status in ("failed", "stopped"))
        rows.append(
            {
                "arm": arm,
                "trials": f"{len(finished)} of {len(own)}",
                "attempts": sum(int(trial.number("attempts") or 0) for trial in own),
                "wall": duration(sum(wall for _, wall in walls)) if walls else "–",
                "training": duration(math.fsum(seconds) / len(seconds)) if seconds else "–",
                "rate": digits(math.fsum(rates) / len(rates)) if rates and sweep.time_claims else "–",
                "memory": digits(max(memory)) if memory and sweep.memory_claims else "–",
            }
        )
    starts = [value for trial in sweep.trials if (value := trial.number("started")) is not None]
    ends = [value for trial in sweep.trials if (value := trial.number("ended")) is not None]
    return {
        "rows": rows,
        "total": duration(total),
        "lost": duration(lost) if lost else "",
        "wall": duration(max(ends) - min(starts)) if starts and ends else "unknown",
        "concurrent": sweep.content.get("concurrent", 1),
    }


def cohort_rows(cohorts: Sequence[Cohort]) -> list[dict[str, Any]]:
    """Return what the trials of each cohort recorded, and which trials these are."""
    rows = []
    for number, cohort in enumerate(cohorts, 1):
        record = cohort.trials[0].record.get("cohort") or {}
        trials: dict[str, list[int]] = {}
        for trial in cohort.trials:
            trials.setdefault(trial.arm, []).append(trial.seed)
        rows.append(
            {
                "number": number,
                "trials": "; ".join(f"{arm}: {', '.join(map(str, seeds))}" for arm, seeds in trials.items()),
                "facts": [
                    {"name": name, "value": setting(value), "differs": name in cohort.traits}
                    for name, value in flatten(record).items()
                ],
            }
        )
    return rows
