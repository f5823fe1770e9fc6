"""The questions that a sweep declared beside its primary metric, each answered from two arms.

Answers carry intervals, and no correction for being several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from evaluate.statistics.intervals import Interval
from evaluate.statistics.verdicts import MIN_SEEDS, Comparison, paired
from evaluate.sweep.analysis import Cohort, Measure, logarithm, measure_of, rate, slope
from evaluate.sweep.files import AGAIN, SWEEP, VALIDATION, RecordedArm, RecordedSweep, RecordedTrial
from evaluate.sweep.words import digits, metric_title, plural, words_of
from nanodit.errors import DataError

NOT_RECORDED = "not recorded by finished trials with a common seed"


@dataclass(frozen=True)
class _Measured:
    """A quantity of a trial that a question asks for; with a ``unit`` arms are compared by their ratio."""

    title: str
    measure: Measure
    less: str
    more: str
    why: str  # there may be no answer
    unit: str = ""


MEASURES = {
    "peak_memory": _Measured(
        "peak memory", lambda trial: trial.number("peak_memory_gb"), "less", "more", NOT_RECORDED, "GB"
    ),
    "iterations_per_second": _Measured("iterations per second", rate, "slower", "faster", NOT_RECORDED, "a second"),
    "slope": _Measured(
        "slope of ln(held-out error) over ln(step)",
        slope,
        "steeper",
        "flatter",
        f"it takes three validations per trial ({VALIDATION} in metrics.jsonl) after a tenth of the steps",
    ),
}


def questions(sweep: RecordedSweep, cohort: Cohort) -> list[dict[str, Any]]:
    """Return the declared questions, each with its answers or why there is none.

    Empty for sweeps that declared none. Raises :class:`DataError` for a declaration that names no arms.
    """
    found = []
    for one in sweep.content.get("questions", ()):
        try:
            other, arm = (sweep.arms[name] for name in one["arms"])
            question, measures = one["ask"], one["measures"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{sweep.folder / SWEEP} is damaged (questions: {error!r}). {AGAIN}") from error
        answers = [_answer(sweep, cohort, other, arm, name) for name in measures]
        found.append({"pair": f"{other.name}–{arm.name}", "question": question, "answers": answers})
    return found


def _answer(sweep: RecordedSweep, cohort: Cohort, other: RecordedArm, arm: RecordedArm, name: str) -> dict[str, str]:
    measured = MEASURES.get(name)
    if measured is None:
        why = reasons([*cohort.of(other.name), *cohort.of(arm.name)], name)
        measured = _Measured(metric_title(name), measure_of(name), "lower", "higher", why)
    if name == "peak_memory" and not sweep.memory_claims:
        why = "trials shared a device by fractions, so no claims about memory are made"
    elif name == "iterations_per_second" and not sweep.time_claims:
        why = "trials ran at the same time on one machine, so no claims about time are made"
    else:
        answer = (_ratio if measured.unit else _difference)(cohort, other, arm, measured)
        failed = [len(cohort.lost(sweep, one.name)) for one in (other, arm)]
        if answer["says"] and failed[0] != failed[1]:
            answer["says"] += (
                f" (of survivors: {plural(failed[0], 'trial')} of {other.name} failed, {failed[1]} of {arm.name})"
            )
        if answer["says"] and sweep.looks.exploratory:
            answer["says"] += " (exploratory: seeds were added, and no max_seeds was declared)"
        return answer
    return {"what": measured.title, "says": "", "why": why}


def _ratio(cohort: Cohort, other: RecordedArm, arm: RecordedArm, of: _Measured) -> dict[str, str]:
    """Compare by the geometric mean of the ratios, seed by seed: t interval over their logarithms."""
    compared = paired(*(cohort.values(one.name, logarithm(of.measure)) for one in (arm, other)))
    if compared is None:
        return {"what": of.title, "says": "", "why": of.why}
    means = [_mean(cohort, one, of.measure) for one in (other, arm)]
    interval = compared.interval
    bounds = [None if bound is None else math.exp(bound) for bound in (interval.low, interval.high)]
    times = words_of(Interval(math.exp(interval.value), *bounds, interval.n), sign=False)
    says = f"{other.name} {digits(means[0])} {of.unit}, {arm.name} {digits(means[1])} {of.unit}: {times} times as much"
    return {"what": of.title, "says": says + _tail(compared, of), "why": ""}


def _difference(cohort: Cohort, other: RecordedArm, arm: RecordedArm, of: _Measured) -> dict[str, str]:
    compared = paired(*(cohort.values(one.name, of.measure) for one in (arm, other)))
    if compared is None:
        return {"what": of.title, "says": "", "why": of.why}
    interval = compared.interval
    like = None if interval.low is None else (interval.high - interval.low) / 2
    theirs, ours = (digits(_mean(cohort, one, of.measure), like) for one in (other, arm))
    says = f"{other.name} {theirs}, {arm.name} {ours}: difference {words_of(interval)}"
    return {"what": of.title, "says": says + _tail(compared, of), "why": ""}


def _tail(compared: Comparison, of: _Measured) -> str:
    interval = compared.interval
    if interval.n < 2:
        return "; single run: no verdict"
    seeds = plural(interval.n, "seed")
    if interval.n < MIN_SEEDS:
        return f"; {seeds} are too few to tell"
    if interval.low <= 0 <= interval.high:
        return f"; {seeds} do not tell them apart"
    return f"; {of.less if interval.value < 0 else of.more}, over {seeds}"


def _mean(cohort: Cohort, arm: RecordedArm, measure: Measure) -> float | None:
    values = cohort.values(arm.name, measure)
    return math.fsum(values.values()) / len(values) if values else None


def reasons(trials: list[RecordedTrial], metric: str) -> str:
    """Return why no trial of these has a metric."""
    found = dict.fromkeys(reason for trial in trials if (reason := trial.excluded(metric)))
    return "; ".join(found) or "no trial has finished"
