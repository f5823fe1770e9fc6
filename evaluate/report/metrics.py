"""The report's numbers: what metrics are called, between which floor and ceiling they lie, and what they conclude."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evaluate.records import NO_SKILL, ROUNDING
from evaluate.report.compare import difference, differing, objections
from evaluate.report.files import Run
from evaluate.statistics.intervals import Interval, more_samples
from evaluate.suite import TESTS, beside, is_charted
from evaluate.suite.declaration import SuiteTest

Metric = Mapping[str, Any]

USUAL = ("all", "text+pose", "text")  # conditions in this order, others behind them
FAMILIES = {start: words for test in TESTS.values() for start, words in test.families.items()}  # in the page's order
PARTS = {name: words for test in TESTS.values() for name, words in test.parts.items()}
PIXELS = ", mean colours"  # what is told by these instead of the judge's features
BASELINE_NAMES = {
    "round_trip": "JPEG round trip",
    "nearest_train": "nearest training image",
    "nearest_features": "nearest by features",
    "identity": "x = z",
    "affine": "affine in z",
}
# What no skill at all gives: the best that a metric has is its floor. And what a perfect model could reach: the first.
FLOORS = (*NO_SKILL, "chance", "best_trivial", "no_gain", "no_swap", "null_edit", "no_edit", "pose_ignored")
CEILINGS = ("round_trip", "ceiling_on_real", "judge_on_real", "detector_on_real", "real", "donor_itself", "unswapped")
ROLES = {start: meant for test in TESTS.values() for start, meant in test.roles.items()}


def test_of(name: str) -> SuiteTest | None:
    """Return the test that a metric belongs to; None for one of another version."""
    return next((test for test in TESTS.values() if test.owns(name)), None)


def label(name: str) -> tuple[str, str, str]:
    """Return a metric's family, condition and detail: ("Attribute accuracy", "text + pose", "hair")."""
    # the longest family that fits: reconstruction/psnr is none for reconstruction/psnr_gain
    stem = name.replace("_pixels", "")
    family = next((known for known in FAMILIES if stem == known or stem.startswith(known + "/")), None)
    if family is None:  # a metric of another version: its own name does
        parts = name.split("/")
        family, title = "/".join(parts[:2]), " ".join(parts[:2]).replace("_", " ")
    else:
        title = FAMILIES[family] + (PIXELS if "_pixels" in name else "")
    condition, _, detail = stem[len(family) + 1 :].partition("/")
    test = test_of(name)
    return title, part_name(condition or (test.default_part if test else "all")), detail


def part_name(condition: str) -> str:
    """Return the name of a condition as people say it: ``text+pose`` becomes "text + pose"."""
    name, _, scale = condition.removeprefix("noises/").partition("@")
    words = "all conditions" if name == "all" else PARTS.get(name, name).replace("+", " + ")
    words = words.replace("/mirrored", ", mirrored").replace("/training", " of training images")
    return words + (f", {guidance_words(scale)}" if scale else "")


def guidance_words(guidance: float | str) -> str:
    """Return a guidance of settings or of a condition's name as people say it: ``self=3`` becomes "self-guidance 3"."""
    text = f"{guidance:g}" if isinstance(guidance, float | int) else guidance
    if text == "1":
        return "no guidance"
    name, _, scale = text.partition("=")
    return f"self-guidance {scale}" if name == "self" else f"guidance {text.replace('=', ' ').replace(',', ', ')}"


def baseline_name(name: str) -> str:
    """Return the name of a baseline as people say it."""
    return BASELINE_NAMES.get(name, name.replace("_", " "))


def condition_order(condition: str) -> tuple[int, str]:
    """Return a key to sort conditions by: the usual three first."""
    return (USUAL.index(condition) if condition in USUAL else len(USUAL), condition)


def metric_order(metric: Metric) -> tuple[int, int, str, tuple[int, str], bool, str]:
    """Return a key to sort metrics by: test, family, the judge's space before mean colours, condition, detail."""
    title, _, detail = label(metric["name"])
    tests, titles = list(TESTS.values()), list(FAMILIES.values())
    test, plain = test_of(metric["name"]), title.removesuffix(PIXELS)
    place = titles.index(plain) if plain in titles else len(titles)
    condition = condition_order(str(metric["settings"].get("conditions", "")))
    own = tests.index(test) if test in tests else len(tests)
    return own, place, title, condition, bool(detail), metric["name"]


def headlines(metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Return the metrics with a bar, for the verdict box, each on a scale of its own."""
    result = []
    for metric in sorted(metrics, key=metric_order):
        if metric["needed"] is not None:
            title, part, detail = label(metric["name"])
            more = more_for(metric, metric["needed"]) if metric["verdict"] == "inconclusive" else None
            part = ", ".join(filter(None, (part, detail)))
            plot = forest(metric, *scale_of([metric]))
            said = {"beside": beside(metric["name"], metric["value"], metric["settings"])}
            result.append({**metric, **said, "title": title, "part": part, "more": more, "plot": plot})
    return result


def more_for(metric: Metric, bar: float) -> int | None:
    """Return about how many more samples would tell a metric from ``bar``; None where that cannot be said."""
    if metric["low"] is None:
        return None
    return more_samples(Interval(metric["value"] - bar, metric["low"] - bar, metric["high"] - bar, metric["n"]))


def roles(metric: Metric) -> tuple[str | None, str | None]:
    """Return the baselines of a metric that are its floor and its ceiling.

    The floor is the best of what needs no skill: whoever gives the mean image, or retrieves a training image, is no
    better than it.
    """
    own = (meant for start, meant in ROLES.items() if metric["name"].startswith(start))
    floors, ceilings = next(own, (FLOORS, CEILINGS))
    known = metric["baselines"]
    best = max if metric["better"] == "higher" else min
    floor = best(
        (name for name in (FLOORS if floors is None else floors) if name in known), key=known.get, default=None
    )
    return floor, next((name for name in ceilings if name in known), None)


def against_floor(metric: Metric) -> dict[str, Any] | None:
    """Whether a metric is ``better`` or ``worse`` than its floor, or inconclusive and how many more samples tell."""
    floor, _ = roles(metric)
    if floor is None or metric["value"] is None:
        return None
    bar = metric["baselines"][floor]
    interval = Interval(metric["value"], metric["low"], metric["high"], metric["n"])
    verdict = {"met": "better", "missed": "worse"}.get(interval.verdict(bar, metric["better"]), "inconclusive")
    if abs(metric["value"] - bar) <= ROUNDING:
        verdict = "inconclusive"
    return {"verdict": verdict, "more": more_for(metric, bar) if verdict == "inconclusive" else None}


def metric_groups(metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Group all metrics by test; of each family, on one scale, one is a headline (:func:`headline_of`).

    The held-out error by t has its chart instead.
    """
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for metric in sorted(metrics, key=metric_order):
        if not is_charted(metric["name"]):
            title, part, detail = label(metric["name"])
            row = {**metric, "title": title, "part": part, "detail": detail, "floor": against_floor(metric)}
            row["beside"] = beside(metric["name"], metric["value"], metric["settings"])
            test = test_of(metric["name"])
            group = test.title if test else metric["name"].partition("/")[0]
            groups.setdefault(group, {}).setdefault(title, []).append(row)
    result = []
    for group, families in groups.items():
        for rows in families.values():
            scale = scale_of(rows)
            for row in rows:
                row["plot"] = forest(row, *scale)
        # mean colours stand for the judge's space only where that is missing
        headline = [
            headline_of(rows, metrics)
            for title, rows in families.items()
            if title.removesuffix(PIXELS) not in families.keys() - {title}
        ]
        count = sum(map(len, families.values()))
        others = families if count > len(headline) else {}
        result.append({"title": group, "headline": headline, "others": others, "count": count})
    return result


def headline_of(rows: Sequence[dict[str, Any]], metrics: Sequence[Metric]) -> dict[str, Any]:
    """Return the row of a family, in the page's order, that stands for it: of the arm that isolates its subject.

    ``metrics`` are all of the evaluation.
    """
    test = test_of(rows[0]["name"])
    if test is None:
        return rows[0]
    gains = (one for one in metrics if test.isolated and one["name"].startswith(f"{test.isolated}/"))
    wanted = [*(one["settings"]["conditions"] for one in gains), *test.headline]
    plain = sorted(rows, key=lambda row: row["name"].count("/"))  # before the breakdown by parts
    measured = {row["settings"].get("conditions"): row for row in reversed(plain)}
    return next((measured[name] for name in wanted if name in measured), rows[0])


def scale_of(metrics: Sequence[Metric]) -> tuple[float, float]:
    """Return the range that shows all values, intervals, bars and baselines, and zero."""
    values = [0.0]
    for metric in metrics:
        values += [metric[name] for name in ("value", "low", "high", "needed") if metric[name] is not None]
        values += metric["baselines"].values()
    low, high = min(values), max(values)
    return (low, high) if high > low else (0.0, 1.0)


def forest(metric: Metric, low: float, high: float) -> dict[str, Any]:
    """Return positions in [0, 1] of a metric's dot, interval, bar and baselines on a scale from ``low`` to ``high``."""

    def place(value: float | None) -> float | None:
        return None if value is None else (value - low) / (high - low)

    named = dict(zip(roles(metric), ("floor", "ceiling")))
    ranked = sorted(metric["baselines"].items(), key=lambda item: item[1])
    baselines = [
        {"name": baseline_name(name), "value": value, "at": place(value), "role": named.get(name, "")}
        for name, value in ranked
    ]
    return {**{name: place(metric[name]) for name in ("value", "low", "high", "needed")}, "baselines": baselines}


def alarms(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the alarms of the tests that have any, and whether each fired (None: cannot be told)."""
    found: dict[tuple[str, str, str, bool | None, float | None], list[str]] = {}
    for run in runs:
        for test in (test for test in TESTS.values() if test.alarms):
            for alarm in run.files.extras.get(test.name, {}).get("alarms", []):
                words = test.alarms.get(alarm["name"], alarm["name"])
                same = (run.letter, test.name, words, alarm["fired"], alarm.get("detectable"))
                given = found.setdefault(same, [])
                given += [part_name(alarm["condition"])] if "condition" in alarm else []
    return [
        {"run": run, "test": test, "words": text, "fired": fired, "given": "; ".join(given), "detectable": detectable}
        for (run, test, text, fired, detectable), given in found.items()
    ]


def comparisons(runs: Sequence[Run]) -> dict[str, Any]:
    """Put the headlines of several runs side by side, with what each has over the first where they may be compared.

    ``objections`` name runs of which nothing may be compared with the first. In ``rows``: ``metrics`` (one for each run
    or None), ``differing`` (why they are not compared, or empty) and ``differences`` (one for each run or None).
    """
    first, *others = runs
    barred = {run.letter: found for run in others if (found := objections(first.files.report, run.files.report))}
    tables = [{metric["name"]: metric for metric in run.files.metrics} for run in runs]
    names = {name: metric for table in reversed(tables) for name, metric in table.items()}
    rows = []
    for metric in sorted(names.values(), key=metric_order):
        if is_charted(metric["name"]):
            continue
        members = [table.get(metric["name"]) for table in tables]
        title, part, detail = label(metric["name"])
        row = {"name": metric["name"], "title": title, "part": part, "detail": detail, "metrics": members}
        rows.append(row | {"differing": {}, "differences": [None]})
        for run, own in zip(others, members[1:]):
            there = own is not None and members[0] is not None and run.letter not in barred
            unlike = differing([members[0], own]) if there else []
            if unlike:
                rows[-1]["differing"][run.letter] = unlike
            scored = there and None not in (own["value"], members[0]["value"])
            compared = difference(own, run.files, first.files) if scored and not unlike else None
            rows[-1]["differences"].append(compared)
    return {"objections": barred, "rows": rows}


def number(value: float | None, metric: Metric) -> str:
    """Write a number of a metric (its value, a bound, a baseline), a dash for null.

    dB get one decimal, shares and similarities two, losses and distances three significant digits.
    """
    if value is None:
        return "–"
    if metric["unit"] == "dB":
        text = f"{value:.1f}"
    elif metric["better"] == "higher":
        text = f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3f}"
    else:
        text = "0" if value == 0 else f"{value:#.3g}".rstrip(".")
    return (text if text.strip("-0.") else text.lstrip("-")).replace("-", "−")  # no negative zero


def signed(value: float, metric: Metric) -> str:
    """Write a difference of a metric with its sign."""
    text = number(value, metric)
    return text if text.startswith("−") or not math.isfinite(value) or value == 0 else f"+{text}"
