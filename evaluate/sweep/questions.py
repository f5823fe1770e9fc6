"""The questions that an ablation A, B, C, D was asked, answered by name where these arms exist.

A (AdamW), B (+ TREAD), C (+ Muon), D (+ REPA): what TREAD saves, what Muon does to the slope of the loss, what REPA
does to the reconstruction. These are beside the primary metric: they carry intervals, and no correction for being
several.
"""

from __future__ import annotations

import math
from typing import Any

from evaluate.statistics.intervals import Interval
from evaluate.statistics.verdicts import MIN_SEEDS, Comparison, paired
from evaluate.sweep.analysis import Cohort, Measure, logarithm, measure_of, rate, slope
from evaluate.sweep.files import VALIDATION, Arm, Sweep, Trial
from evaluate.sweep.words import digits, plural, words_of

LPIPS = "reconstruction/lpips"


def questions(sweep: Sweep, cohort: Cohort) -> list[dict[str, Any]]:
    """The questions whose two arms exist, each with its answers or why there is none; empty for other sweeps."""
    asked = (
        ("A", "B", "What does TREAD save?", ("tread",), _savings),
        ("B", "C", "What does Muon do to the slope of the loss?", ("optimizer",), _slopes),
        ("C", "D", "What does REPA do to the reconstruction?", ("repa",), _reconstruction),
    )
    found = []
    for theirs, ours, question, section, answer in asked:
        other, arm = arm_named(sweep, theirs), arm_named(sweep, ours)
        # arms that are called so, but ask something else, are not what the question is about
        if other is None or arm is None or not any(key.partition(".")[0] in section for key in arm.differences):
            continue
        answers = answer(sweep, cohort, other, arm)
        found.append({"pair": f"{other.name}–{arm.name}", "question": question, "answers": answers})
    return found


def arm_named(sweep: Sweep, letter: str) -> Arm | None:
    """The arm called by a letter, alone or with words behind it (``A``, ``A_adamw``)."""
    named = [arm for arm in sweep.arms.values() if arm.role != "a/a"]
    starting = [arm for arm in named if arm.name[:1] == letter and not arm.name[1:2].isalnum()]
    return next((arm for arm in named if arm.name == letter), next(iter(starting), None))


def _savings(sweep: Sweep, cohort: Cohort, other: Arm, arm: Arm) -> list[dict[str, str]]:
    shared = "trials shared a device by fractions, so that no claims about memory are made"
    beside = "trials ran at the same time on one machine, so that no claims about time are made"
    return [
        _ratio(cohort, other, arm, "peak memory", lambda trial: trial.number("peak_memory_gb"), "GB", "less", "more")
        if sweep.memory_claims
        else {"what": "peak memory", "says": "", "why": shared},
        _ratio(cohort, other, arm, "iterations per second", rate, "a second", "slower", "faster")
        if sweep.time_claims
        else {"what": "iterations per second", "says": "", "why": beside},
    ]


def _slopes(sweep: Sweep, cohort: Cohort, other: Arm, arm: Arm) -> list[dict[str, str]]:
    what = "slope of ln(held-out loss) over ln(step)"
    why = f"it takes three validations a trial ({VALIDATION} in metrics.jsonl) after a tenth of the steps"
    return [_difference(cohort, other, arm, what, slope, why, "steeper", "flatter")]


def _reconstruction(sweep: Sweep, cohort: Cohort, other: Arm, arm: Arm) -> list[dict[str, str]]:
    names = {name for trial in cohort.trials for name in trial.metrics}
    name = next((known for known in (LPIPS, *sorted(names)) if known in names and known.startswith(LPIPS)), LPIPS)
    why = reasons([*cohort.of(other.name), *cohort.of(arm.name)], name)
    return [_difference(cohort, other, arm, "reconstruction LPIPS", measure_of(name), why, "lower (closer)", "higher")]


def _ratio(
    cohort: Cohort, other: Arm, arm: Arm, what: str, measure: Measure, unit: str, less: str, more: str
) -> dict[str, str]:
    """Geometric mean of the ratios, seed by seed: t interval over their logarithms."""
    compared = paired(*(cohort.values(one.name, logarithm(measure)) for one in (arm, other)))
    if compared is None:
        return {"what": what, "says": "", "why": "not recorded by finished trials of a common seed"}
    means = [_mean(cohort, one, measure) for one in (other, arm)]
    interval = compared.interval
    bounds = [None if bound is None else math.exp(bound) for bound in (interval.low, interval.high)]
    times = words_of(Interval(math.exp(interval.value), *bounds, interval.n), sign=False)
    says = f"{other.name} {digits(means[0])} {unit}, {arm.name} {digits(means[1])} {unit}: {times} times as much"
    return {"what": what, "says": says + _tail(compared, less, more), "why": ""}


def _difference(
    cohort: Cohort, other: Arm, arm: Arm, what: str, measure: Measure, why: str, less: str, more: str
) -> dict[str, str]:
    compared = paired(*(cohort.values(one.name, measure) for one in (arm, other)))
    if compared is None:
        return {"what": what, "says": "", "why": why}
    interval = compared.interval
    like = None if interval.low is None else (interval.high - interval.low) / 2
    theirs, ours = (digits(_mean(cohort, one, measure), like) for one in (other, arm))
    says = f"{other.name} {theirs}, {arm.name} {ours}: difference {words_of(interval)}"
    return {"what": what, "says": says + _tail(compared, less, more), "why": ""}


def _tail(compared: Comparison, less: str, more: str) -> str:
    interval = compared.interval
    if interval.n < 2:
        return "; single run: no verdict"
    seeds = plural(interval.n, "seed")
    if interval.n < MIN_SEEDS:
        return f"; {seeds} are too few to tell"
    if interval.low <= 0 <= interval.high:
        return f"; {seeds} do not tell them apart"
    return f"; {less if interval.value < 0 else more}, over {seeds}"


def _mean(cohort: Cohort, arm: Arm, measure: Measure) -> float | None:
    values = cohort.values(arm.name, measure)
    return math.fsum(values.values()) / len(values) if values else None


def reasons(trials: list[Trial], metric: str) -> str:
    """Why no trial of these has a metric."""
    found = dict.fromkeys(reason for trial in trials if (reason := trial.excluded(metric)))
    return "; ".join(found) or "no trial has finished"
