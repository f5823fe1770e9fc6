"""The report's numbers: what metrics are called, between which floor and ceiling they lie, and what they conclude."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evaluate.report.compare import difference, differing, objections
from evaluate.report.files import Run
from evaluate.statistics.intervals import Interval, more_samples

Metric = Mapping[str, Any]

USUAL = ("all", "text+pose", "text")  # conditions in this order, others behind them
TESTS = {  # the first part of a metric's name -> the heading it stands under, in the order of the page
    "heldout": "Held-out loss",
    "reconstruction": "Reconstruction",
    "attribute": "Attributes",
    "swap": "DINO swap",
    "edit": "Text edits",
    "divergence": "Divergence",
    "pose": "Pose",
    "memorisation": "Memorisation (an indicator)",
    "distribution": "Distribution",
}
FAMILIES = {  # the beginning of metric names -> how people say it; in the order of the page
    "heldout_loss": "Held-out flow loss",
    "heldout_ratio": "Held-out error / best trivial",
    "heldout_gap": "Loss on training images less held-out",
    "reconstruction/psnr": "PSNR",
    "reconstruction/psnr_gain": "PSNR gained over a random pair",
    "reconstruction/ssim": "SSIM",
    "reconstruction/lpips": "LPIPS",
    "reconstruction/dino_similarity": "DINO similarity",
    "reconstruction/skill_mse": "Skill on squared error",
    "reconstruction/skill_ssim": "Skill on SSIM",
    "reconstruction/skill_lpips": "Skill on LPIPS",
    "reconstruction/skill_dino_similarity": "Skill on DINO similarity",
    "attribute_accuracy": "Attribute accuracy",
    "swap/gain": "Likeness gained toward the donor",
    "swap/identified": "Donor identified",
    "swap/text_kept": "Text kept under the swap",
    "swap/similarity_kept": "Likeness to the own image kept",
    "edit/effect": "Effect beyond the null edit",
    "edit/direction": "Edited colour is there",
    "edit/direction_gain": "Edited colour gained",
    "edit/direction_probe": "Shift of the probe toward the edit",
    "edit/preserved": "Kept outside of the edit",
    "edit/pose_kept": "Joints kept under the edit",
    "divergence/diversity": "Diversity over noises",
    "divergence/ratio": "Diversity / pairs of real images",
    "divergence/variety": "Variety over prompts / real",
    "divergence/diversity_change": "Diversity, change over checkpoints",
    "divergence/error_change": "Distance to real, change over checkpoints",
    "pose_pck": "Pose, PCK at 0.1",
    "pose_oks": "Pose, OKS",
    "pose_mirror": "Pose met less its mirror image met",
    "pose_persons": "Persons drawn",
    "memorisation/copies": "Likely copies",
    "memorisation/distance_ratio": "Distance to training / that of the holdout",
    "distribution/fd": "FD",
    "distribution/kid": "KID",
    "distribution/cmmd": "CMMD",
    "distribution/fd_above_real": "FD above real",
    "distribution/kid_above_real": "KID above real",
    "distribution/cmmd_above_real": "CMMD above real",
}
DEFAULT_PARTS = {"swap": "CLS and patches", "edit": "another attribute"}  # where the name does not say which
PARTS = {"cls": "CLS alone", "patches": "patches alone", "opposite": "the opposite"}
PIXELS = ", mean colours"  # what is told by these instead of the judge's features
BASELINE_NAMES = {
    "round_trip": "JPEG round trip",
    "nearest_train": "nearest training image",
    "identity": "x = z",
    "affine": "affine in z",
}
# What no skill at all gives, and what a perfect model could reach: the first of each that a metric has.
FLOORS = ("random_pair", "chance", "best_trivial", "mean_image", "no_swap", "null_edit", "no_edit")
CEILINGS = ("round_trip", "judge_on_real", "detector_on_real", "real", "donor_itself", "unswapped")
ROLES = {  # metrics, by the beginning of their names, that mean something else by the same names
    "heldout": (("best_trivial", "affine"), ()),
    "edit/effect": (("null_edit",), ()),
    "edit/preserved": (("random_pair",), ("null_edit",)),
    "edit/pose_kept": ((), ("null_edit",)),
    "divergence": (("round_trip", "mean_image"), ("real_pairs", "real")),
    "memorisation": ((), ("real",)),
    "distribution": (("mean_image",), ("real",)),
}


def test_of(name: str) -> str:
    """The test that a metric belongs to."""
    return name.partition("/")[0].partition("_")[0]


def label(name: str) -> tuple[str, str, str]:
    """A metric's family, condition and detail as people say them: ("Attribute accuracy", "text + pose", "hair")."""
    # the longest family that fits: reconstruction/psnr is none for reconstruction/psnr_gain
    stem = name.replace("_pixels", "")
    family = next((known for known in FAMILIES if stem == known or stem.startswith(known + "/")), None)
    if family is None:  # a metric of another version: its own name does
        parts = name.split("/")
        family, title = "/".join(parts[:2]), " ".join(parts[:2]).replace("_", " ")
    else:
        title = FAMILIES[family] + (PIXELS if "_pixels" in name else "")
    condition, _, detail = stem[len(family) + 1 :].partition("/")
    return title, part_name(condition or DEFAULT_PARTS.get(test_of(name), "all")), detail


def part_name(condition: str) -> str:
    """The name of a condition as people say it: ``text+pose`` becomes "text + pose"."""
    name, _, scale = condition.removeprefix("noises/").partition("@")
    words = "all conditions" if name == "all" else PARTS.get(name, name).replace("+", " + ")
    words = words.replace("/mirrored", ", mirrored")
    return words + (", no guidance" if scale == "1" else f", guidance {scale}" if scale else "")


def baseline_name(name: str) -> str:
    """The name of a baseline as people say it."""
    return BASELINE_NAMES.get(name, name.replace("_", " "))


def condition_order(condition: str) -> tuple[int, str]:
    """A key to sort conditions by: the usual three first."""
    return (USUAL.index(condition) if condition in USUAL else len(USUAL), condition)


def metric_order(metric: Metric) -> tuple[int, int, str, tuple[int, str], bool, str]:
    """A key to sort metrics by: test, family, the judge's space before mean colours, condition, detail."""
    title, _, detail = label(metric["name"])
    tests, titles = list(TESTS), list(FAMILIES.values())
    test, plain = test_of(metric["name"]), title.removesuffix(PIXELS)
    place = titles.index(plain) if plain in titles else len(titles)
    condition = condition_order(str(metric["settings"].get("conditions", "")))
    own = tests.index(test) if test in tests else len(tests)
    return own, place, title, condition, bool(detail), metric["name"]


def headlines(metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """The metrics with a bar, for the verdict box, each on a scale of its own."""
    result = []
    for metric in sorted(metrics, key=metric_order):
        if metric["needed"] is not None:
            title, part, detail = label(metric["name"])
            more = more_for(metric, metric["needed"]) if metric["verdict"] == "inconclusive" else None
            part = ", ".join(filter(None, (part, detail)))
            plot = forest(metric, *scale_of([metric]))
            result.append({**metric, "title": title, "part": part, "more": more, "plot": plot})
    return result


def more_for(metric: Metric, bar: float) -> int | None:
    """About how many more samples would tell a metric from ``bar``; None where that cannot be said."""
    if metric["low"] is None:
        return None
    return more_samples(Interval(metric["value"] - bar, metric["low"] - bar, metric["high"] - bar, metric["n"]))


def roles(metric: Metric) -> tuple[str | None, str | None]:
    """The baselines of a metric that are its floor and its ceiling."""
    own = (meant for start, meant in ROLES.items() if metric["name"].startswith(start))
    floors, ceilings = next(own, (FLOORS, CEILINGS))
    return tuple(next((name for name in names if name in metric["baselines"]), None) for names in (floors, ceilings))


def against_floor(metric: Metric) -> dict[str, Any] | None:
    """Whether a metric is ``better`` or ``worse`` than its floor, or inconclusive and how many more samples tell."""
    floor, _ = roles(metric)
    if floor is None or metric["value"] is None:
        return None
    bar = metric["baselines"][floor]
    interval = Interval(metric["value"], metric["low"], metric["high"], metric["n"])
    verdict = {"met": "better", "missed": "worse"}.get(interval.verdict(bar, metric["better"]), "inconclusive")
    return {"verdict": verdict, "more": more_for(metric, bar) if verdict == "inconclusive" else None}


def metric_groups(metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """All metrics by test; of each family, on one scale, the first is a headline.

    The held-out error by t has its chart instead.
    """
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for metric in sorted(metrics, key=metric_order):
        if not metric["name"].startswith("heldout_mse/"):
            title, part, detail = label(metric["name"])
            row = {**metric, "title": title, "part": part, "detail": detail, "floor": against_floor(metric)}
            groups.setdefault(test_of(metric["name"]), {}).setdefault(title, []).append(row)
    result = []
    for test, families in groups.items():
        for rows in families.values():
            scale = scale_of(rows)
            for row in rows:
                row["plot"] = forest(row, *scale)
        # mean colours stand for the judge's space only where that is missing
        headline = [
            rows[0] for title, rows in families.items() if title.removesuffix(PIXELS) not in families.keys() - {title}
        ]
        count = sum(map(len, families.values()))
        others = families if count > len(headline) else {}
        result.append({"title": TESTS.get(test, test), "headline": headline, "others": others, "count": count})
    return result


def scale_of(metrics: Sequence[Metric]) -> tuple[float, float]:
    """The range that shows all values, intervals, bars and baselines, and zero."""
    values = [0.0]
    for metric in metrics:
        values += [metric[name] for name in ("value", "low", "high", "needed") if metric[name] is not None]
        values += metric["baselines"].values()
    low, high = min(values), max(values)
    return (low, high) if high > low else (0.0, 1.0)


def forest(metric: Metric, low: float, high: float) -> dict[str, Any]:
    """Positions in [0, 1] of a metric's dot, interval, bar and baselines on a scale from ``low`` to ``high``."""

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
    """The alarms of the divergence and memorisation tests, and whether each fired (None: cannot be told)."""
    words = {
        "collapse": "collapse: the noise makes less difference than a JPEG round trip",
        "collapsing": "collapsing: diversity falls over the checkpoints",
        "drift": "drift: pictures move away from the real ones over the checkpoints",
        "memorisation": "memorisation: more likely copies of training images than chance gives, an indicator",
    }
    found: dict[tuple[str, str, bool | None], list[str]] = {}
    for run in runs:
        for test in ("divergence", "memorisation"):
            for alarm in run.files.extras.get(test, {}).get("alarms", []):
                given = found.setdefault((run.letter, words.get(alarm["name"], alarm["name"]), alarm["fired"]), [])
                given += [part_name(alarm["condition"])] if "condition" in alarm else []
    return [
        {"run": run, "words": text, "fired": fired, "given": "; ".join(given)}
        for (run, text, fired), given in found.items()
    ]


def comparisons(runs: Sequence[Run]) -> dict[str, Any]:
    """Every headline of several runs side by side, and what each has over the first where they may be compared.

    ``objections`` name runs of which nothing may be compared with the first. In ``rows``: ``metrics`` (one for each run
    or None), ``differing`` (why they are not compared, or empty) and ``differences`` (one for each run or None).
    """
    first, *others = runs
    barred = {run.letter: found for run in others if (found := objections(first.files.report, run.files.report))}
    tables = [{metric["name"]: metric for metric in run.files.metrics} for run in runs]
    names = {name: metric for table in reversed(tables) for name, metric in table.items()}
    rows = []
    for metric in sorted(names.values(), key=metric_order):
        if metric["name"].startswith("heldout_mse/"):
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
    """A number of a metric (its value, a bound, a baseline) as people read it, a dash for null.

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
    """A difference of a metric with its sign."""
    text = number(value, metric)
    return text if text.startswith("−") or not math.isfinite(value) or value == 0 else f"+{text}"
