"""The conclusions from a sweep's finished trials: one comparison for each arm with what it was declared against.

Only trials of one cohort (equal code, data and environment) are ever put together, and only finished ones take part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from evaluate.report.compare import differing
from evaluate.statistics.looks import Looks
from evaluate.statistics.verdicts import (
    Comparison,
    Effect,
    RankTest,
    Verdict,
    factorial_effects,
    holm,
    judge_comparisons,
    needed_seeds,
    paired,
    rank_failures,
    welch,
)
from evaluate.sweep.files import VALIDATION, RecordedArm, RecordedSweep, RecordedTrial

Measure = Callable[[RecordedTrial], float | None]

EVALUATED_WITH = (
    "guidance",
    "method",
    "steps",
    "interval",
    "conditions",
    "sampler",
    "grid",
)  # what an arm may declare to change
SLOPE_FROM = 0.1  # share of the steps from which on the slope of the loss is taken: past the warm-up


@dataclass(frozen=True)
class Contrast:
    """One arm against another in one metric.

    ``failed`` are the numbers of trials of both that ended without a value, of as many as ``ended``, and ``ranks`` the
    test that counts them as the worst; ``stopped`` says that early stopping ended some of them. ``barred`` says why
    the two may not be compared (settings of the metric that differ), ``undeclared`` which keys the arm changes beyond
    its factor: the verdict is then on all of it together.
    """

    arm: RecordedArm
    against: str
    comparison: Comparison | None
    verdict: Verdict
    barred: Sequence[str] = ()
    failed: tuple[int, int] = (0, 0)
    ended: tuple[int, int] = (0, 0)
    ranks: RankTest | None = None
    stopped: bool = False

    @property
    def survivors(self) -> bool:
        """Whether more trials failed in one arm than in the other, so that those left are not comparable."""
        return self.failed[0] != self.failed[1]

    @property
    def repeat(self) -> bool:
        """Whether the arm is the baseline again, from other seeds."""
        return self.arm.role == "a/a"


@dataclass(frozen=True)
class Cohort:
    """Trials of equal code, data and environment; ``traits`` are those in which the sweep's cohorts differ."""

    trials: Sequence[RecordedTrial]
    traits: Mapping[str, Any]

    def of(self, arm: str) -> list[RecordedTrial]:
        """Return the arm's trials."""
        return [trial for trial in self.trials if trial.arm == arm]

    def values(self, arm: str, measure: Measure) -> dict[int, float]:
        """Return training seed -> value of the arm's trials that have one."""
        found = {trial.seed: measure(trial) for trial in self.of(arm)}
        return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}

    def lost(self, sweep: RecordedSweep, arm: str) -> list[int]:
        """Return the seeds of the arm's trials that ended without the primary metric.

        Of this cohort, or of one in which none finished, as that of a trial that went on under other code: what is
        known of such trials is only that they failed.
        """
        own = {trial.cohort for trial in self.trials}
        others = {trial.cohort for trial in sweep.trials if trial.status == "finished"} - own
        return [
            trial.seed
            for trial in sweep.trials
            if trial.arm == arm and trial.lost(sweep.primary) and trial.cohort not in others
        ]


def split_cohorts(sweep: RecordedSweep) -> list[Cohort]:
    """Return the finished trials by cohort, the largest first."""
    groups: dict[str, list[RecordedTrial]] = {}
    for trial in sweep.trials:
        if trial.status == "finished":
            groups.setdefault(trial.cohort, []).append(trial)
    flat = {text: flatten(json.loads(text)) for text in groups}
    names = sorted({name for traits in flat.values() for name in traits})
    unlike = [name for name in names if len({repr(traits.get(name)) for traits in flat.values()}) > 1]
    order = sorted(groups, key=lambda text: (-len(groups[text]), text))
    return [Cohort(groups[text], {name: flat[text].get(name) for name in unlike}) for text in order]


def flatten(content: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted names."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        nested = isinstance(value, Mapping)
        found |= flatten(value, f"{above}{name}.") if nested else {f"{above}{name}": value}
    return found


def measure_of(metric: str) -> Measure:
    """Return the metric of a trial that takes part in claims about it."""
    return lambda trial: trial.value(metric) if trial.excluded(metric) is None else None


def contrasts(
    sweep: RecordedSweep, cohort: Cohort, measure: Measure, mode: str, margin: float | None, metric: str = ""
) -> list[Contrast]:
    """Compare every arm with what it was declared against, and judge the comparisons.

    Holm's correction is over the arms; the A/A arm makes no claim, is judged by itself and, since its seeds are others,
    by Welch's t. Arms of which unequal numbers of trials failed are not judged: their survivors are. ``metric`` is what
    the measure is called in report.json, if it is from there: its settings must agree.
    """
    pairs = [(arm, arm.against) for arm in sweep.arms.values() if arm.against in sweep.arms]
    barred = {arm.name: _settings_that_differ(cohort, arm, other, metric) for arm, other in pairs}
    lost = {arm: cohort.lost(sweep, arm) for arm in sweep.arms}
    compared: dict[str, Comparison | None] = {}
    ranks: dict[str, RankTest | None] = {}
    for arm, other in pairs:
        values, others = cohort.values(arm.name, measure), cohort.values(other, measure)
        if arm.role == "a/a":
            compared[arm.name] = welch([*values.values()], [*others.values()])
        else:
            compared[arm.name] = paired(values, others)
            if lost[arm.name] or lost[other]:
                ranks[arm.name] = rank_failures(values, others, lost[arm.name], lost[other], mode)
        if barred[arm.name]:
            compared[arm.name] = None
    survivors = {arm.name for arm, other in pairs if len(lost[arm.name]) != len(lost[other])}
    claims = {arm.name: compared[arm.name] for arm, _ in pairs if arm.role != "a/a" and arm.name not in survivors}
    verdicts = judge_comparisons(claims, mode, margin, sweep.looks)
    for arm, _ in pairs:
        if arm.role == "a/a" and arm.name not in survivors:
            verdicts |= judge_comparisons({arm.name: compared[arm.name]}, mode, margin, sweep.looks)
            verdicts[arm.name] = _of_a_repeat(verdicts[arm.name], compared[arm.name], margin, sweep.looks)
    for name in survivors:
        verdicts[name] = Verdict("no verdict", note="unequally many trials failed, and the others are what survived")
    found = []
    for arm, other in pairs:
        failed = (len(lost[arm.name]), len(lost[other]))
        ended = tuple(len({*lost[name], *cohort.values(name, measure)}) for name in (arm.name, other))
        stopped = any(trial.status == "stopped" for trial in sweep.trials if trial.arm in (arm.name, other))
        one = Contrast(
            arm, other, compared[arm.name], verdicts[arm.name], barred[arm.name], failed, ended, ranks.get(arm.name),
            stopped,
        )  # fmt: skip
        found.append(one)
    return found


def _of_a_repeat(verdict: Verdict, one: Comparison | None, margin: float | None, looks: Looks) -> Verdict:
    """Return what more seeds would settle where the truth is known: no difference, whatever the mean so far."""
    if one is None or verdict.seeds is None:
        return verdict
    seeds = needed_seeds(replace(one, interval=replace(one.interval, value=0.0)), margin, looks=looks, doubt=0.0)
    return replace(verdict, seeds=seeds, toward="equivalent" if seeds else None)


def _settings_that_differ(cohort: Cohort, arm: RecordedArm, other: str, metric: str) -> list[str]:
    trials = [*cohort.of(arm.name), *cohort.of(other)]
    entries = [trial.metrics[metric] for trial in trials if metric in trial.metrics and trial.excluded(metric) is None]
    found = differing([{"n": None, **entry} for entry in entries]) if entries else []
    if any(key.partition(".")[0] in ("evaluate", *EVALUATED_WITH) for key in arm.differences):
        found = [text for text in found if text.partition(" ")[0] not in EVALUATED_WITH]
    return found


@dataclass(frozen=True)
class AtEqual:
    """The held-out error in training where every trial is asked at the same place: ``at`` a step or a minute."""

    axis: str
    at: float
    values: Mapping[str, Mapping[int, float]]  # arm -> seed -> loss
    contrasts: Sequence[Contrast]


def at_equal(sweep: RecordedSweep, cohort: Cohort, axis: str) -> AtEqual | None:
    """Compare the validations at the end of the trial that ends first on ``axis`` ("step" or "minutes").

    Linear between a trial's validations, and never beyond them: a trial whose first validation is later has no value.
    None where no trial was validated.
    """
    curves = {(trial.arm, trial.seed): trial.curve(VALIDATION, axis) for trial in cohort.trials}
    ends = [points[-1][0] for points in curves.values() if points]
    if not ends:
        return None
    place = min(ends)
    measured = {name: interpolate(points, place) for name, points in curves.items()}
    margin = sweep.margin if sweep.primary in ("heldout_error", VALIDATION) else None
    found = contrasts(sweep, cohort, lambda trial: measured.get((trial.arm, trial.seed)), "min", margin)
    values = {arm: cohort.values(arm, lambda trial: measured.get((trial.arm, trial.seed))) for arm in sweep.arms}
    return AtEqual(axis, place, values, found)


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """Return the value at ``x``, linear between points of rising x; None outside of them."""
    if not points or not points[0][0] <= x <= points[-1][0]:
        return None
    return float(np.interp(x, *zip(*points)))


def slope(trial: RecordedTrial) -> float | None:
    """Return how steeply the held-out error falls: the least-squares slope of ln(error) over ln(step).

    An error that falls as step^-a has the slope -a. From SLOPE_FROM of the steps on; None below three validations.
    """
    points = [(step, loss) for step, loss in trial.curve(VALIDATION) if step > 0 and loss > 0]
    points = [point for point in points if point[0] >= SLOPE_FROM * points[-1][0]]
    if len(points) < 3:
        return None
    steps, losses = np.log(np.array(points)).T
    return float(np.polyfit(steps, losses, 1)[0])


def rate(trial: RecordedTrial) -> float | None:
    """Return Steps per second of training alone."""
    steps, seconds = trial.number("steps"), trial.number("seconds")
    return steps / seconds if steps and seconds else None


def logarithm(measure: Measure) -> Measure:
    """Return the logarithm of a positive measure, so that differences are ratios."""

    def taken(trial: RecordedTrial) -> float | None:
        value = measure(trial)
        return math.log(value) if value is not None and value > 0 else None

    return taken


@dataclass(frozen=True)
class Factorial:
    """Effects of a full factorial with Holm's p over all of them; ``reason`` says why there are none."""

    effects: Sequence[Effect] = ()
    adjusted: Sequence[float | None] = ()
    reason: str = ""


def factorial(sweep: RecordedSweep, cohort: Cohort) -> Factorial:
    """Return main effects and interactions on the primary metric, where the arms are all combinations of the factors.

    What an arm has on is collected along what it was declared against. Each factor must mean the same settings
    wherever it is on.
    """
    levels = {}
    for arm in sweep.arms.values():
        if arm.against and arm.against not in sweep.arms:
            return Factorial(reason=f"{arm.name} is to be compared with {arm.against}, which was not asked for")
        if arm.role != "a/a":
            levels[arm.name] = chain(sweep, arm)
    factors = sorted({name for link in levels.values() for name in link})
    if len(factors) < 2:
        return Factorial(reason="the arms change a single factor")
    cells: dict[frozenset[str], str] = {}
    for name, link in levels.items():
        repeated = frozenset(link)
        if repeated in cells or len(link) != len(repeated):
            return Factorial(
                reason=f"{name} and {cells.get(repeated, name)} have the same factors on, with other settings"
            )
        cells[repeated] = name
    missing = 2 ** len(factors) - len(cells)
    if missing:
        return Factorial(
            reason=f"only {len(cells)} of the {2 ** len(factors)} combinations of {', '.join(factors)} are arms, so "
            "each effect is known only on top of the arm that it was compared with, and no interaction is known"
        )
    settings = {name: _settings(sweep, sweep.arms[name]) for name in levels}
    for factor in factors:
        prefixes = tuple(sweep.content.get("factors", {}).get(factor, ()))
        seen = {repr(_under(settings[name], prefixes)) for name, link in levels.items() if factor in link}
        if len(seen) > 1:
            return Factorial(reason=f"{factor} stands for different settings in different arms")
    if sweep.looks.exploratory:
        return Factorial(reason="seeds were added, and no max_seeds was declared: the sweep is exploratory")
    failed = {name: len(cohort.lost(sweep, name)) for name in levels}
    if len(set(failed.values())) > 1:
        counts = ", ".join(f"{count} of {name}" for name, count in failed.items() if count)
        return Factorial(reason=f"unequally many trials failed ({counts}), and the others are what survived")
    measure = measure_of(sweep.primary)
    found = factorial_effects({cell: cohort.values(name, measure) for cell, name in cells.items()}, factors)
    if found is None:
        return Factorial(reason="no training seed has finished in every arm")
    tested = [sweep.looks.adjust(effect.comparison.p) for effect in found if effect.comparison.p is not None]
    adjusted = holm(tested)[0] if len(tested) == len(found) else [None] * len(found)
    return Factorial(found, adjusted)


def chain(sweep: RecordedSweep, arm: RecordedArm) -> list[str]:
    """Return the factors that are on in an arm, from the first arm on.

    What is declared in a circle ends where it closes.
    """
    found, seen = [], set()
    while arm.against in sweep.arms and arm.name not in seen:
        seen.add(arm.name)
        found += arm.factors[::-1]
        arm = sweep.arms[arm.against]
    return found[::-1]


def _settings(sweep: RecordedSweep, arm: RecordedArm) -> dict[str, Any]:
    """Return the keys that an arm has changed since the first arm, and to what."""
    links, seen = [arm], set()
    while links[-1].against in sweep.arms and links[-1].name not in seen:
        seen.add(links[-1].name)
        links.append(sweep.arms[links[-1].against])
    return {key: pair[1] for link in reversed(links) for key, pair in link.differences.items()}


def _under(settings: Mapping[str, Any], prefixes: Sequence[str]) -> dict[str, Any]:
    within = {key for key in settings for prefix in prefixes if key == prefix or key.startswith(prefix + ".")}
    return {key: settings[key] for key in sorted(within)}


def front(points: Mapping[str, tuple[float, float]], mode: str) -> list[str]:
    """Return the names of points (cost, quality) that none other beats in both, by rising cost."""
    sign = 1 if mode == "min" else -1
    order = sorted(points, key=lambda name: (points[name][0], sign * points[name][1]))
    found, best = [], math.inf
    for name in order:
        if sign * points[name][1] < best:
            best = sign * points[name][1]
            found.append(name)
    return found


def band(
    curves: Sequence[Sequence[tuple[float, float]]], limit: int = 80
) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """Return the mean over seeds of several curves, and the range of the seeds, where all of them have values.

    Curves of equal x are averaged point by point, others on at most ``limit`` of their places, linear between theirs.
    """
    curves = [points for points in curves if points]
    if not curves:
        return [], []
    if all([x for x, _ in points] == [x for x, _ in curves[0]] for points in curves):
        places = [x for x, _ in curves[0]]
    else:
        low, high = max(points[0][0] for points in curves), min(points[-1][0] for points in curves)
        if low >= high:
            return [], []
        places = sorted({x for points in curves for x, _ in points if low <= x <= high} | {low, high})
        if len(places) > limit:
            places = np.linspace(low, high, limit).tolist()
    table = np.array([np.interp(places, *zip(*points)) for points in curves])
    means, lows, highs = table.mean(0), table.min(0), table.max(0)
    lines = [(x, float(y)) for x, y in zip(places, means)]
    return lines, [(x, float(a), float(b)) for x, a, b in zip(places, lows, highs)] if len(curves) > 1 else []


def ticks_even(values: Sequence[float], count: int) -> list[float]:
    """Return at most ``count`` of the values, evenly spread, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    chosen = [values[round(index * (len(values) - 1) / (count - 1))] for index in range(count)]
    return [chosen[0], *(after for before, after in pairwise(chosen) if after != before)]
