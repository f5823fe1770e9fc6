"""The arms of a sweep's page as plain values: verdicts, warnings, differences, seeds, other metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from evaluate.statistics.intervals import Interval
from evaluate.statistics.verdicts import MIN_SEEDS, Comparison, half_width, paired, welch
from evaluate.suite import is_charted
from evaluate.sweep.analysis import Cohort, Contrast, flatten, measure_of
from evaluate.sweep.files import RecordedSweep
from evaluate.sweep.words import digits, failed_words, metric_title, more_words, p_words, plural, setting, words_of
from nanodit.svg import seed_points

STYLES = ("c1", "c2", "c3", "c4", "c5", "c6")
UNKNOWN_COHORT = ("unknown", None, "")
WHY_NO_TIME = (
    "trials ran at the same time on one machine, so their times depend on each other and no claims about time are "
    "made. To get them, run the sweep with one trial at a time"
)


def styles(sweep: RecordedSweep) -> dict[str, str]:
    """Return the CSS class of each arm; after six the colours come again, dashed, and the A/A arm is grey."""
    claims = [arm for arm in sweep.arms.values() if arm.role != "a/a"]
    found = {arm.name: STYLES[index % 6] + (" again" if index >= 6 else "") for index, arm in enumerate(claims)}
    return {name: found.get(name, "b1") for name in (*sweep.arms, *(trial.arm for trial in sweep.trials))}


def budget(sweep: RecordedSweep) -> str:
    """Return what every trial was given."""
    given = sweep.content.get("budget") or {}
    words = {"steps": "steps", "hours": "hours of training", "samples": "images"}
    return " and ".join(f"{value:,} {words.get(name, name)}" for name, value in given.items() if value) or "unknown"


def scale(intervals: Sequence[Interval], extra: Sequence[float] = ()) -> tuple[float, float]:
    """Return the range of a forest plot: all intervals, what is ``extra``, and zero in it."""
    values = [0.0, *extra]
    for one in intervals:
        values += [value for value in (one.value, one.low, one.high) if value is not None and math.isfinite(value)]
    low, high = min(values), max(values)
    air = 0.04 * (high - low) or 1.0
    return low - air, high + air


def forest(comparison: Comparison | None, bounds: tuple[float, float], margin: float | None) -> dict[str, Any] | None:
    """Return the shares of the plot's width at which dot, interval, zero, margin and every seed's difference are."""
    if comparison is None:
        return None
    low, high = bounds

    def place(value: float | None) -> float | None:
        return None if value is None else min(1.0, max(0.0, (value - low) / (high - low)))

    interval = comparison.interval
    return {
        "value": place(interval.value),
        "low": place(interval.low),
        "high": place(interval.high),
        "zero": place(0.0),
        "margin": (place(-margin), place(margin)) if margin else None,
        "seeds": [(seed, value, place(value)) for seed, value in comparison.differences.items()],
    }


def verdict_rows(sweep: RecordedSweep, found: Sequence[Contrast]) -> list[dict[str, Any]]:
    """Return each comparison with its verdict, all on one scale: zero, the margin and the intervals."""
    intervals = [one.comparison.interval for one in found if one.comparison]
    seeds = [value for one in found if one.comparison for value in one.comparison.differences.values()]
    margin = sweep.margin or 0.0
    bounds = scale(intervals, [*seeds, -margin, margin])
    rows = []
    for one in found:
        compared, verdict = one.comparison, one.verdict
        notes = [note for note in (failed_words(one), verdict.note) if note]
        if one.barred:
            notes = [f"not compared: measured with different settings ({'; '.join(one.barred)})"]
        if one.arm.undeclared:
            notes.append(f"also differs in {', '.join(one.arm.undeclared)}: the verdict covers all of it together")
        if len(one.arm.factors) > 1:
            notes.append(f"changes {' and '.join(one.arm.factors)} together: the verdict covers both")
        if one.repeat and compared:
            notes.append("seeds differ from the baseline's, so not paired: Welch's t, outside Holm's correction")
        rows.append(
            {
                "arm": one.arm.name,
                "against": one.against,
                "factor": " + ".join(one.arm.factors) or ("the same again" if one.repeat else "–"),
                "word": verdict.word,
                "flagged": bool(one.arm.undeclared),
                "difference": words_of(compared.interval) if compared else "–",
                "n": compared.interval.n if compared else 0,
                "p": p_words(None if one.repeat else verdict.adjusted),
                "forest": forest(compared, bounds, sweep.margin),
                "more": "" if one.repeat and not verdict.seeds else more_words(verdict, compared, sweep.looks),
                "notes": notes,
            }
        )
    return rows


def banners(
    sweep: RecordedSweep, cohorts: Sequence[Cohort], judged: Sequence[Sequence[Contrast]]
) -> list[dict[str, Any]]:
    """Return what has to be known before any number is read; ``bad`` ones are red."""
    found = []
    for arm in sweep.arms.values():
        if arm.undeclared:
            keys = ", ".join(arm.undeclared)
            found.append((True, f"{arm.name} differs from {arm.against} in more than its factor: {keys}", ""))
        if arm.against and arm.against not in sweep.arms:
            found.append((False, f"{arm.name} is not compared: {arm.against} was not asked for", ""))
    for one in (one for contrasts in judged for one in contrasts):
        if one.barred:
            found.append((True, f"{one.arm.name} and {one.against} were measured with different settings", ""))
        if one.repeat and one.verdict.word in ("better", "worse"):
            text = "One such repeat in twenty does so by chance; otherwise the machine or the seeds are at fault."
            found.append((True, f"The baseline differs from its own repeat ({one.arm.name})", text))
    if len(cohorts) > 1:
        traits = ", ".join(cohorts[0].traits)
        text = f"They differ in {traits} and are judged separately. The rest of the page shows the largest."
        found.append((True, f"The finished trials are of {len(cohorts)} cohorts", text))
    tally = {status: [t for t in sweep.trials if t.status == status] for status in ("running", "not started")}
    if any(tally.values()):
        counts = ", ".join(f"{len(trials)} {status}" for status, trials in tally.items() if trials)
        done = sum(trial.status == "finished" for trial in sweep.trials)
        text = "Verdicts that are read and acted upon before a sweep ends are wrong more often than they claim."
        found.append(
            (False, f"This sweep is not finished: {done} of {len(sweep.trials)} trials have finished, {counts}", text)
        )
    lost = [trial for trial in sweep.trials if trial.status in ("failed", "stopped")]
    if lost:
        names = ", ".join(f"{trial.arm} seed {trial.seed} ({trial.status})" for trial in lost)
        found.append((False, f"{plural(len(lost), 'trial')} take{'s' if len(lost) == 1 else ''} no part: {names}", ""))
    unscored = [t for t in sweep.trials if t.status == "finished" and t.excluded(sweep.primary)]
    for trial in unscored:
        found.append((False, f"{trial.arm} seed {trial.seed} takes no part", f"{trial.excluded(sweep.primary)}"))
    if not sweep.time_claims:
        found.append((False, "No claims about time", WHY_NO_TIME[0].upper() + WHY_NO_TIME[1:] + "."))
    if not sweep.memory_claims:
        found.append((False, "No claims about memory", "Trials shared a device by fractions."))
    doubts = sorted({doubt for cohort in cohorts for doubt in doubts_of(cohort)})
    if doubts:
        head = "Whether all trials had the same code, data and environment cannot be told"
        found.append((False, head, "; ".join(doubts)))
    return [{"bad": bad, "head": head, "text": text} for bad, head, text in found]


def doubts_of(cohort: Cohort) -> list[str]:
    """Return what keeps equal records from meaning equal code and data."""
    record = cohort.trials[0].record.get("cohort") or {}
    if not record:
        return ["the trials did not record them"]
    facts = flatten(record)
    found = [f"{name.replace('_', ' ')} is unknown" for name, value in facts.items() if value in UNKNOWN_COHORT]
    if not any(name.endswith(("code", "commit")) for name in facts):
        found.append("the code is unknown")
    if any(name.endswith("dirty") and value is True for name, value in facts.items()):
        found.append("the code had uncommitted changes")
    return found


def arm_rows(sweep: RecordedSweep) -> list[dict[str, Any]]:
    """Describe every arm by what it changes, declared or not, in what it is compared with."""
    rows = []
    for arm in sweep.arms.values():
        undeclared = set(arm.undeclared)
        changes = [
            {"key": key, "theirs": setting(pair[0]), "ours": setting(pair[1]), "undeclared": key in undeclared}
            for key, pair in sorted(arm.differences.items(), key=lambda item: (item[0] in undeclared, item[0]))
        ]
        # of the first arm, which is compared with none, what it sets itself
        own = [{"key": key, "value": setting(value)} for key, value in arm.overrides.items()] if not arm.against else []
        own_trials = [trial for trial in sweep.trials if trial.arm == arm.name]
        rows.append(
            {
                "name": arm.name,
                "against": arm.against,
                "role": {"baseline": "baseline", "a/a": "the baseline again, other seeds"}.get(arm.role, ""),
                "factor": ", ".join(arm.factors),
                "changes": changes,
                "own": own,
                "seeds": ", ".join(str(trial.seed) for trial in own_trials),
                "finished": sum(trial.excluded(sweep.primary) is None for trial in own_trials),
                "asked": len(own_trials),
            }
        )
    return rows


def seed_table(sweep: RecordedSweep, cohorts: Sequence[Cohort]) -> dict[str, Any]:
    """Return the primary metric of every trial; its interval, over images, describes that one run."""
    number = {trial.folder: index for index, cohort in enumerate(cohorts, 1) for trial in cohort.trials}
    measure = measure_of(sweep.primary)
    every = [value for trial in sweep.trials if (value := measure(trial)) is not None]
    like = (max(every) - min(every)) / 4 if len(every) > 1 else None
    rows = []
    for arm in dict.fromkeys(trial.arm for trial in sweep.trials):
        own = [trial for trial in sweep.trials if trial.arm == arm]
        cells = []
        for trial in own:
            entry, reason = trial.metrics.get(sweep.primary, {}), trial.excluded(sweep.primary)
            within = entry.get("low") is not None and not reason
            cells.append(
                {
                    "seed": trial.seed,
                    "value": "" if reason else digits(trial.value(sweep.primary), like),
                    "range": f"[{digits(entry['low'], like)}, {digits(entry['high'], like)}]" if within else "",
                    "reason": reason and (trial.status if trial.status != "finished" else reason),
                    "cohort": number.get(trial.folder) if len(cohorts) > 1 else None,
                }
            )
        values = [value for trial in own if (value := measure(trial)) is not None]
        # no mean of trials that are not to be pooled
        mean = math.fsum(values) / len(values) if values and len(cohorts) == 1 else None
        rows.append({"arm": arm, "cells": cells, "mean": digits(mean, like)})
    return {"columns": max(len(row["cells"]) for row in rows) if rows else 0, "rows": rows}


def points_chart(sweep: RecordedSweep, cohort: Cohort) -> Any:
    """Draw the primary metric of every seed of every arm."""
    values = {arm: cohort.values(arm, measure_of(sweep.primary)) for arm in sweep.arms}
    return seed_points(values, styles(sweep), metric_title(sweep.primary))


def metric_rows(sweep: RecordedSweep, cohort: Cohort) -> list[dict[str, Any]]:
    """Return every other metric: the arms' means, and differences with intervals that claim nothing."""
    names = dict.fromkeys(name for trial in cohort.trials for name in trial.metrics)
    failed = {arm: len(cohort.lost(sweep, arm)) for arm in sweep.arms}
    rows = []
    for name in names:
        if is_charted(name):
            continue
        measure = measure_of(name)
        values = {arm: cohort.values(arm, measure) for arm in sweep.arms}
        every = [value for own in values.values() for value in own.values()]
        if not every:
            continue
        like = max((max(every) - min(every)) / 4, 1e-3 * max(map(abs, every)))
        cells = []
        for arm in sweep.arms.values():
            own = values[arm.name]
            compared = None
            if arm.against in sweep.arms and own:
                other = values[arm.against]
                repeat = arm.role == "a/a"
                compared = welch([*own.values()], [*other.values()]) if repeat else paired(own, other)
            told = compared is not None and compared.interval.n >= MIN_SEEDS and compared.p <= 0.05
            told = told and not sweep.looks.exploratory and failed[arm.name] == failed[arm.against]
            cells.append(
                {
                    "arm": arm.name,
                    "mean": digits(math.fsum(own.values()) / len(own), like) if own else "–",
                    "difference": words_of(compared.interval) if compared else "",
                    "told": told,
                }
            )
        rows.append({"title": metric_title(name), "name": name, "primary": name == sweep.primary, "cells": cells})
    return rows


def changes(sweep: RecordedSweep, found: Sequence[Contrast]) -> list[dict[str, str]]:
    """Say for each comparison what it would take to conclude something else."""
    rows = []
    for one in found:
        name, compared, verdict = f"{one.arm.name} against {one.against}", one.comparison, one.verdict
        if one.survivors and not one.barred:
            remedy = "Find out why, and run the arms again where none fails."
            if one.stopped:
                remedy = "Judge these arms in a sweep without early stopping."
            text = failed_words(one)
            rows.append({"name": name, "word": verdict.word, "text": f"{text[0].upper()}{text[1:]}. {remedy}"})
            continue
        if compared is None or compared.interval.low is None:
            why = "Measure both arms in the same way." if one.barred else "Finish three training seeds of both arms."
            rows.append({"name": name, "word": verdict.word, "text": why})
            continue
        n = compared.interval.n
        half = (compared.interval.high - compared.interval.low) / 2
        text = f"With {plural(n, 'seed')} and this spread, a difference below {digits(half)} cannot be told from none."
        if verdict.word in ("inconclusive", "single run: no verdict"):
            more = more_words(verdict, compared, sweep.looks)
            text += f" {more[:1].upper()}{more[1:]}."
            if verdict.seeds and verdict.toward == "different":
                wanted = digits(float(half_width(compared.spreads, [verdict.seeds[0]])[0]))
                text += f" With {plural(verdict.seeds[0], 'seed')} the interval is about ±{wanted} wide."
        elif verdict.word.startswith("exploratory"):
            text = "A sweep that declares max_seeds before its first trial may grow up to it and be judged."
        elif verdict.word == "equivalent":
            farthest = digits(max(abs(compared.interval.low), abs(compared.interval.high)))
            text = f"Equivalent for the margin of ±{sweep.margin:g}; a margin below {farthest} would have left it open."
        else:
            near = min(abs(compared.interval.low), abs(compared.interval.high))
            text = f"The interval stays {digits(near)} away from zero: a bias of that size in every seed would undo it."
        if one.arm.undeclared:
            text += " To learn about the factor alone, run the arm again without its undeclared changes."
        rows.append({"name": name, "word": verdict.word, "text": text})
    return rows
